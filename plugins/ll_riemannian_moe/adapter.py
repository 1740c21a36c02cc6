"""MoELoRAAdapter: stacked low-rank experts and a router on one linear layer.

Sun et al., 2025, arXiv:2502.15828; equations and symbols in `functional.py`.

    A_i    lora_A    (E, rank, d_in)     starts at U(-1/sqrt(d_in), 1/sqrt(d_in)), each expert its own draw
    B_i    lora_B    (E, d_out, rank)    starts at 0
    G      router    (E, d_in)           starts like lora_A

Departs from the paper: auxiliary losses and load statistics are additions; all experts are computed for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ll_riemannian_moe.functional import (
    balance_loss,
    gated_experts,
    gates,
    router_logits,
    selected,
    z_loss,
)
from lora_lightning.adapters.base import RunningSum, write_uniform
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.low_rank import keep_mask
from lora_lightning.adapters.pair import PairAdapter
from lora_lightning.errors import AdapterStateError, SettingsError


class Pending:
    """Router losses of forwards that no backward has followed yet; they carry a graph, so copies start empty.

    Attributes:
        values: weighted losses, a number for each forward.
        hidden: whether a training forward ran with gradients off, and so has no loss here.
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.hidden = False

    def __reduce__(self) -> tuple[type[Pending], tuple[()]]:
        return Pending, ()


class MoELoRAAdapter(PairAdapter):
    """Experts and router of one layer.

    The router's losses of a training forward wait in this module until `Method.penalty` takes them. A backward drops
    what is still there: by then that can only come from a forward that gradient checkpointing has run again.

    Args:
        base: a linear layer.
        experts: E.
        top_k: experts that each token uses.
        rank: inner width of each expert, at most the smaller side of the weight.
        scaling: s.
        dropout: probability of dropping entries of the experts' input while training, the same for all experts.
        gate_exponent: q, in backward only.
        balance: weight of the load-balance loss.
        z: weight of the router's z-loss.

    Raises:
        SettingsError: a layer that is not linear, or a rank above its size.
    """

    additive = False
    mergeable = False

    def __init__(
        self,
        base: BaseLayer,
        *,
        experts: int,
        top_k: int,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        gate_exponent: float = 0.5,
        balance: float = 0.0,
        z: float = 0.0,
    ) -> None:
        super().__init__()
        _check_linear(base)
        self.top_k, self.gate_exponent, self.balance, self.z = top_k, gate_exponent, balance, z
        self.hold_pair(base, rank=rank, scaling=scaling, dropout=dropout, lead=(experts,))
        self.shown = f"experts={experts}, top_k={top_k}, rank={rank}, gate_exponent={gate_exponent:g}"
        self.router = nn.Parameter(base.zeros(experts, base.d_in))
        self.load = RunningSum()
        self.pending = Pending()

    def reset_others(self, generator: torch.Generator) -> None:
        """The router uniform by row length, like A."""
        write_uniform(self.router, generator)

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + s sum_i g_i(x) B_i A_i drop(x)."""
        y = base(x)
        logits = router_logits(x, self.router)
        g = gates(logits, self.top_k)
        dropout = self.dropout if self.training else 0.0
        return gated_experts(
            y,
            x,
            self.lora_A,
            self.lora_B,
            g,
            scaling=self.scaling / (1.0 - dropout),
            exponent=self.gate_exponent,
            mask=keep_mask(x, dropout) if dropout else None,
            watcher=self._watch(logits, g),
        )

    def _watch(self, logits: Tensor, g: Tensor) -> Callable[[Tensor], None] | None:
        """Collect losses of this forward, and count its load in backward; nothing outside training."""
        if not (self.training and self.router.requires_grad):
            return None
        if not torch.is_grad_enabled():
            self.pending.hidden = True
            return None
        losses = self._losses(logits, g)
        if not torch.compiler.is_compiling():
            self.pending.values += losses
            return self._seen_in_backward
        # a traced backward may change nothing outside itself: the load of a recomputed forward counts twice, which
        # fractions do not show, and only the latest call of a layer gives a loss
        self.pending.values = losses
        self._count(g)
        return None

    def _losses(self, logits: Tensor, g: Tensor) -> list[Tensor]:
        """One number, the weighted sum; none where no loss has a weight."""
        losses = []
        if self.balance:
            losses.append(self.balance * balance_loss(logits, g))
        if self.z:
            losses.append(self.z * z_loss(logits))
        return [torch.stack(losses).sum()] if losses else []

    def _seen_in_backward(self, g: Tensor) -> None:
        self._count(g)
        self.pending.values.clear()

    def _count(self, g: Tensor) -> None:
        self.load.add(selected(g), g.shape[0])

    def take_losses(self) -> list[Tensor]:
        """Weighted router losses since the last backward, a number for each forward; they are handed over once.

        Raises:
            AdapterStateError: the only training forward ran with gradients off.
        """
        pending, self.pending = self.pending, Pending()
        if pending.hidden and not pending.values:
            raise AdapterStateError(
                "the router's losses cannot be read: the training forward ran with gradients off, as reentrant "
                "gradient checkpointing does. Use use_reentrant=False, or set balance_loss and z_loss to 0."
            )
        return pending.values

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s/E sum_i B_i A_i where every token has the same gates: one expert, or a zero router that uses all.

        Raises:
            AdapterStateError: the update depends on the input.
        """
        experts = self.router.shape[0]
        if experts > 1 and (self.top_k < experts or bool(self.router.any())):
            raise AdapterStateError(
                f"the update depends on the input: {self.top_k} of {experts} experts are mixed token by token, so no "
                "merged weight exists. One does for a single expert, or for a router of zeros that uses all experts."
            )
        product = (self.lora_B.to(weight.dtype) @ self.lora_A.to(weight.dtype)).sum(0)
        return weight + (self.scaling / experts) * product

    def statistics(self) -> Mapping[str, RunningSum]:
        """Fraction of tokens that each expert received."""
        return {"load": self.load}

    def idle(self) -> frozenset[str]:
        """The router of a single expert, whose gate is always 1."""
        return frozenset({"router"}) if self.router.shape[0] == 1 else frozenset()


def _check_linear(base: BaseLayer) -> None:
    if base.kind != "linear" or base.lead:
        kind = "stack of experts" if base.lead else base.kind
        raise SettingsError(
            f"the router reads one vector a token, which a {kind} layer does not have as its input; it takes linear "
            "layers (nn.Linear, Conv1D of transformers). Exclude the others."
        )
