"""LoRA-Flow in miniature: one gate a block weights frozen LoRAs, token by token. Wang et al., 2024, arXiv:2402.11455.

    w = softmax(W_g h) + b                     h: hidden states entering the block; W_g (k, d), b (k,)
    y = W x + sum_i w_i B_i (A_i x)            for every adapted layer of the block

W_g = 0 and b = one_hot(last) - 1/k at the start: the last LoRA alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, write_uniform, write_values, write_zeros
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.linked import Linked
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.injection.gates import ForwardContext, Gate, gate_weights
from lora_lightning.methods import Adapters, Method


class FlowGate(Gate):
    """softmax(W_g h) + b; a sample's own weights where the context has them."""

    def __init__(self, experts: int, width: int, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, width, dtype=like.dtype, device=like.device))
        self.bias = nn.Parameter(torch.zeros(experts, dtype=like.dtype, device=like.device))

    def forward(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        if context.sample_weights is not None:
            return context.sample_weights[:, None].expand(*hidden.shape[:-1], -1).to(hidden.dtype)
        scores = (hidden @ self.weight.to(hidden.dtype).mT).softmax(-1)
        return scores + self.bias.to(hidden.dtype)

    def reset(self, generator: torch.Generator) -> None:
        write_zeros(self.weight)
        write_values(
            self.bias, nn.functional.one_hot(torch.tensor(len(self.bias) - 1), len(self.bias)) - 1 / len(self.bias)
        )


class BankAdapter(Adapter):
    """base(x) + B (w * A x) with the frozen factors of all experts side by side."""

    mergeable = False
    bank_A: Tensor
    bank_B: Tensor

    def __init__(self, base: BaseLayer, experts: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.register_buffer("bank_A", base.zeros(experts * rank, base.d_in))
        self.register_buffer("bank_B", base.zeros(base.d_out, experts * rank))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        w = gate_weights(self.linked["gate"]).repeat_interleave(self.rank, dim=-1)
        return add_low_rank(base, x, self.bank_A, self.bank_B, w)

    def merged_weight(self, weight: Tensor) -> Tensor:
        raise NotImplementedError("depends on the input")

    def reset(self, generator: torch.Generator) -> None:
        write_uniform(self.bank_A, generator)
        write_uniform(self.bank_B, generator)


@dataclass(frozen=True, kw_only=True)
class LoRAFlow(Method):
    """Gates over frozen LoRAs; here random ones."""

    mergeable = False
    starts_at_base = False
    export = "not expressible"

    experts: int = 2
    """Number of LoRAs."""
    rank: int = 2
    """Rank of each."""

    def build(self, base: BaseLayer) -> Adapter:
        return BankAdapter(base, self.experts, self.rank)

    def link(self, model: nn.Module, adapters: Adapters) -> Mapping[str, Linked]:
        gates: dict[str, Linked] = {}
        for path, adapter in adapters.items():
            names = path.split(".")
            block = ".".join(names[: next(i for i, name in enumerate(names) if name.isdigit()) + 1])
            if block not in gates:
                gates[block] = FlowGate(self.experts, model.config.hidden_size, adapter.bank_A)
            adapter.linked = {"gate": gates[block]}
        return gates
