"""Starts of a pair of factors from a weight, a covariance of inputs or a gradient; and starts that are subtracted.

    weight_start        s B A is the best approximation of W of rank r          (or of its trailing part)
    covariance_start    rows of A are the leading directions of the inputs      B stays zero
    gradient_start      A and B are leading singular vectors of dL/dW

Singular vectors are computed in float64 and have signs of their own choice: the largest entry of a right one is
positive, so that two machines start alike.

A start with s B0 A0 != 0 would change the model. `SubtractedStart` keeps A0 and B0 and takes their product off again:

    y = base(x) + (s B A x - s B0 A0 x),      W' = W + s (B A - B0 A0)

The weight itself is never written, so that it can be shared, quantized or sharded, and at the start the difference is
exactly zero: both products are the same numbers, subtracted before the base is added.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, FactorPair, check_dropout, check_rank, write_values
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import SettingsError


class Factors(NamedTuple):
    """Two factors, in float64."""

    A: Tensor
    """(*lead, rank, d_in)"""
    B: Tensor
    """(*lead, d_out, rank)"""


def singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (*lead, m, k), S (*lead, k), V^T (*lead, k, n) in float64, with fixed signs."""
    U, S, Vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    largest = Vh.abs().argmax(dim=-1, keepdim=True)
    sign = Vh.gather(-1, largest).sign()
    return U * sign.mT, S, Vh * sign


def weight_start(
    weight: Tensor, rank: int, scaling: float, part: Literal["leading", "trailing"] = "leading"
) -> Factors:
    """Factors with s B A = sum of `rank` singular triplets of the weight; half of each singular value on each side.

    Args:
        weight: (*lead, d_out, d_in).
        rank: number of triplets.
        scaling: s.
        part: which end of the spectrum.
    """
    U, S, Vh = singular(weight)
    keep = slice(0, rank) if part == "leading" else slice(S.shape[-1] - rank, None)
    root = (S[..., keep] / scaling).sqrt()
    return Factors(root[..., :, None] * Vh[..., keep, :], U[..., :, keep] * root[..., None, :])


def covariance_start(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading directions of inputs as orthonormal rows (rank, d_in), and all eigenvalues, largest first.

    Args:
        covariance: (d_in, d_in), symmetric.
        rank: number of directions.
    """
    _, values, directions = singular(covariance)
    return directions[:rank], values


def gradient_start(gradient: Tensor, rank: int) -> Factors:
    """A: the `rank` leading right singular vectors; B: the left ones that follow, so that no direction is there twice.

    Where the gradient has fewer than 2 `rank` directions, B takes the leading ones too.

    Args:
        gradient: dL/dW, (d_out, d_in).
        rank: number of directions of each side.
    """
    U, S, Vh = singular(gradient)
    first = rank if 2 * rank <= S.shape[-1] else 0
    return Factors(Vh[..., :rank, :], U[..., :, first : first + rank])


class SubtractedStart(Adapter):
    """A pair of factors whose start (*lead, rank, d_in), (*lead, d_out, rank) is kept and subtracted.

    Args:
        base: the layer.
        rank: inner width of the update.
        scaling: s.
        dropout: probability of dropping entries of the trained product's input while training.
    """

    additive = True

    def __init__(self, base: BaseLayer, *, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        check_rank(base, rank)
        check_dropout(base, dropout)
        self.scaling, self.dropout = scaling, dropout
        self.lora_A = nn.Parameter(base.zeros(rank, base.d_in))
        self.lora_B = nn.Parameter(base.zeros(base.d_out, rank))
        self.register_buffer("start_A", base.zeros(rank, base.d_in))
        self.register_buffer("start_B", base.zeros(base.d_out, rank))

    start_A: Tensor
    start_B: Tensor

    def start_at(self, factors: Factors) -> None:
        """Start at these factors, and subtract them from now on."""
        for name, value in (("A", factors.A), ("B", factors.B)):
            if not bool(torch.isfinite(value).all()):
                raise SettingsError(f"the start of factor {name} holds values that are not finite.")
            write_values(getattr(self, f"start_{name}"), value)
            write_values(getattr(self, f"lora_{name}"), value)

    def reset(self, generator: torch.Generator) -> None:  # noqa: ARG002 - the start is no matter of chance
        """Both factors are where they started, so the update is exactly zero; before `start_at` that is zero too."""
        write_values(self.lora_A, self.start_A)
        write_values(self.lora_B, self.start_B)

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + (s B A drop(x) - s B0 A0 x)."""
        y = base(x)
        dtype = base.dtype if base.kind == "embedding" else x.dtype
        dropped = nn.functional.dropout(x, self.dropout) if self.training and self.dropout else x
        trained = self._product(base, dropped, y, self.lora_A.to(dtype), self.lora_B.to(dtype))
        return y + (trained - self._product(base, x, y, self.start_A.to(dtype), self.start_B.to(dtype)))

    def _product(self, base: BaseLayer, x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return base.up(base.down(x, A), B, onto=torch.zeros_like(y), scale=self.scaling)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s (B A - B0 A0)."""
        trained = self.lora_B.to(weight.dtype) @ self.lora_A.to(weight.dtype)
        start = self.start_B.to(weight.dtype) @ self.start_A.to(weight.dtype)
        return weight + self.scaling * (trained - start)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """([A; A0], s [B, -B0]): rank 2 r, on the weight as it is."""
        A = torch.cat([self.lora_A.detach(), self.start_A], dim=-2)
        return A, self.scaling * torch.cat([self.lora_B.detach(), -self.start_B], dim=-1)

    def factor_pairs(self) -> tuple[FactorPair, ...]:
        """The trained pair."""
        return (FactorPair("", self.lora_A, self.lora_B, self.scaling),)

    def extra_repr(self) -> str:
        """Rank and scaling for `print(model)`."""
        return f"rank={self.lora_A.shape[-2]}, scaling={self.scaling:g}, start subtracted"
