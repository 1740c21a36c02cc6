"""What an adapter has folded into its layer so far: a log of factors, or one dense update.

An adapter that trains in stages gives its update F_t away at the end of each, and starts again at zero. The sum of what
it gave is its shift D; the next stage trains on W0 + D.

    outer_step    D_t = D_t-1 + share F_t
    figure_ema    S_t = (1 - share) S_t-1 + share F_t,   D_t = D_t-1 + S_t

    log     D = sum_k c_k B_k A_k   two factors a stage; no weight is touched, so any base will do
    dense   D                       added to the weight in float32 and rounded once; the original waits on the CPU

Sums are in float32, because a small update added to bfloat16 weights is lost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lightning.adapters.folding_rules import Rule
from lora_lightning.adapters.layers.base import BaseLayer, plus_product
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.distributed import full_tensor, local, own_rows, zeros_sharded_like


class FactoredUpdate(nn.Module):
    """Folded low-rank updates, side by side; grows by the rank of each."""

    log_A: Tensor
    """(*lead, C, d_in)"""
    log_B: Tensor
    """(*lead, d_out, C)"""
    log_weight: Tensor
    """c, (C,)"""
    slow_weight: Tensor
    """Weights of the moving average S, (C,)."""

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        for name, size in {"log_A": (0, base.d_in), "log_B": (base.d_out, 0)}.items():
            self.register_buffer(name, base.zeros(*size))
        for name in ("log_weight", "slow_weight"):
            self.register_buffer(name, torch.zeros(0, dtype=base.adapter_dtype, device=base.device))

    def fold(self, A: Tensor, B: Tensor, share: float, rule: Rule) -> None:
        """Add an update B A, for A (*lead, r, d_in) and B (*lead, d_out, r)."""
        new, older = self.log_weight.new_full((A.shape[-2],), share), self.slow_weight
        self.log_A, self.log_B = torch.cat([self.log_A, A], dim=-2), torch.cat([self.log_B, B], dim=-1)
        self.slow_weight = torch.cat([older * (1 - share if rule == "figure_ema" else 0), new])
        self.log_weight = torch.cat([self.log_weight, torch.zeros_like(new)]) + self.slow_weight

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + D x."""
        if not len(self.log_weight):  # nothing folded yet; a convolution cannot have no output channel
            return base(x)
        return add_low_rank(base, x, self.log_A, self.log_B, self.log_weight)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + D."""
        A, B = self.low_rank()
        return plus_product(weight, B.to(weight.dtype), A.to(weight.dtype))

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias, unchanged."""
        return bias

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(A (C, d_in), B (d_out, C)) with D == B A."""
        return self.log_A, self.log_B * self.log_weight


class DenseUpdate(nn.Module):
    """A folded update of any form."""

    delta: Tensor
    """D, (d_out, d_in), in float32 at least; sharded where the weight is."""
    slow: Tensor
    """S of the rule "figure_ema", (d_out, d_in); there once it is needed."""

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.register_buffer("delta", base.zeros_like_weight())

    def fold(self, update: Tensor, share: float, rule: Rule) -> None:
        """Add an update F, whole, (d_out, d_in)."""
        delta, own = local(self.delta), own_rows(update, self.delta)
        if rule == "outer_step":
            delta.add_(own, alpha=share)
            return
        if not hasattr(self, "slow"):
            self.register_buffer("slow", zeros_sharded_like(self.delta, self.delta.dtype))
        delta.add_(local(self.slow).mul_(1 - share).add_(own, alpha=share))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + D, whole."""
        return weight + full_tensor(self.delta).to(weight.dtype)


Shift = FactoredUpdate | DenseUpdate
UPDATE_TENSORS = ("log_A", "log_B", "log_weight", "slow_weight", "delta", "slow")
"""Names of all buffers that a shift may have."""


def update_like(base: BaseLayer, tensors: Mapping[str, Tensor]) -> Shift | None:
    """An empty shift that `tensors`, by name, fit into; None where they fit none."""
    shift: Shift = DenseUpdate(base) if "delta" in tensors else FactoredUpdate(base)
    if isinstance(shift, FactoredUpdate) and tensors.keys() == {"log_A", "log_B", "log_weight", "slow_weight"}:
        columns = len(tensors["log_weight"])
        for name, size in {"log_A": (columns, base.d_in), "log_B": (base.d_out, columns)}.items():
            setattr(shift, name, base.zeros(*size))
        shift.log_weight, shift.slow_weight = (shift.log_weight.new_zeros(columns) for _ in range(2))
    if isinstance(shift, DenseUpdate) and "slow" in tensors:
        shift.register_buffer("slow", zeros_sharded_like(shift.delta, shift.delta.dtype))
    own = {name: tensor.shape for name, tensor in shift.state_dict().items()}
    return shift if own == {name: tensor.shape for name, tensor in tensors.items()} else None
