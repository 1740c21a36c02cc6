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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.adapters.seeds import generator
from lora_lightning.adapters.weights import BaseLayer, plus_product
from lora_lightning.cascades import Rule
from lora_lightning.pieces import local, own_rows, whole, zeros_laid_out


class LogShift(nn.Module):
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


class DenseShift(nn.Module):
    """A folded update of any form."""

    delta: Tensor
    """D, (d_out, d_in), in float32 at least; in pieces where the weight is."""
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
            self.register_buffer("slow", zeros_laid_out(self.delta, self.delta.dtype))
        delta.add_(local(self.slow).mul_(1 - share).add_(own, alpha=share))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + D, whole."""
        return weight + whole(self.delta).to(weight.dtype)


Shift = LogShift | DenseShift
SHIFT_TENSORS = ("log_A", "log_B", "log_weight", "slow_weight", "delta", "slow")
"""Names of all buffers that a shift may have."""


def shift_like(base: BaseLayer, tensors: Mapping[str, Tensor]) -> Shift | None:
    """An empty shift that `tensors`, by name, fit into; None where they fit none."""
    shift: Shift = DenseShift(base) if "delta" in tensors else LogShift(base)
    if isinstance(shift, LogShift) and tensors.keys() == {"log_A", "log_B", "log_weight", "slow_weight"}:
        columns = len(tensors["log_weight"])
        for name, size in {"log_A": (columns, base.d_in), "log_B": (base.d_out, columns)}.items():
            setattr(shift, name, base.zeros(*size))
        shift.log_weight, shift.slow_weight = (shift.log_weight.new_zeros(columns) for _ in range(2))
    if isinstance(shift, DenseShift) and "slow" in tensors:
        shift.register_buffer("slow", zeros_laid_out(shift.delta, shift.delta.dtype))
    own = {name: tensor.shape for name, tensor in shift.state_dict().items()}
    return shift if own == {name: tensor.shape for name, tensor in tensors.items()} else None


@dataclass(frozen=True)
class Noise:
    """Uniform noise on a weight, a function of (seed, stage, path): never stored, drawn again where it is needed.

    Entries lie in [-scale / 2, scale / 2].
    """

    seed: int
    stage: int
    path: str
    scale: float

    def values(self, shape: Sequence[int]) -> Tensor:
        """Numbers of U[-1/2, 1/2] for all entries, float32 on the CPU; a generator gives them one after another."""
        drawn = generator(self.seed, "noise", self.stage, self.path)
        return torch.rand(tuple(shape), generator=drawn, device=drawn.device).sub_(0.5)

    def draw(self, like: Tensor, dtype: torch.dtype | None = None, values: Tensor | None = None) -> Tensor:
        """The noise for what this process holds of `like`, drawn whole, so that an entry's is the same anywhere.

        Args:
            like: the weight, (d_out, d_in).
            dtype: of the noise; the weight's by default.
            values: what `values` gives, where it has been called already.
        """
        values = self.values(like.shape) if values is None else values
        return self.scale * own_rows(values, like).to(like.device, dtype or like.dtype)
