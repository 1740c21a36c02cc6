"""PSTAdapter: a changed weight of which the entries of least score are zero.

Li et al., 2022, arXiv:2205.11005, section 3.

    What = W + beta U V
    S    = |What| + a1 A_m B_m + a2 (R 1^T + 1 C^T)
    M    = 0 at the floor(n v) entries of least S, of n in the matrix, and 1 elsewhere
    y    = (M * What) x + b

Backward goes straight through the choice of M, with D = dL/d(M * What):   dL/dS = D * What

    paper     here            shape (out, in as nn.Linear stores it)
    W         weight          (d_out, d_in)   frozen
    U, V      lora_B, lora_A  (d_out, rank), (rank, d_in)          U starts at N(0, 1), V at zero
    A_m, B_m  score_B, score_A  (d_out, score_rank), (score_rank, d_in)   likewise
    R, C      score_rows, score_columns   (d_out,), (d_in,)        zero at the start
    v         removed         floor(n v), a count in a buffer that the schedule writes

Departs from the paper: of equal scores the first entries go. Each expert of a stack is a matrix of its own.
Convolutions and embeddings are adapted as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, FactorPair, check_rank, write_zeros
from lora_lightning.adapters.from_weight import forward_from_weight
from lora_lightning.adapters.layers.base import BaseLayer, plus_product
from lora_lightning.adapters.weight_entries import kept_mask
from lora_lightning.adapters.weighted import write_normal


class PSTAdapter(Adapter):
    """The pruned weight of one layer.

    Args:
        base: the layer.
        rank: inner width of the update.
        score_rank: inner width of the low-rank part of the scores.
        scalings: beta; a1, of the low-rank part of the scores; a2, of what they have by row and by column.

    Raises:
        SettingsError: a rank above the layer's size.
    """

    removed: Tensor

    def __init__(self, base: BaseLayer, rank: int, score_rank: int, scalings: tuple[float, float, float]) -> None:
        super().__init__()
        check_rank(base, rank)
        check_rank(base, score_rank, "score_rank")
        self.scaling, self.score_scaling, self.line_scaling = scalings
        self.lora_A = nn.Parameter(base.zeros(rank, base.d_in))
        self.lora_B = nn.Parameter(base.zeros(base.d_out, rank))
        self.score_A = nn.Parameter(base.zeros(score_rank, base.d_in))
        self.score_B = nn.Parameter(base.zeros(base.d_out, score_rank))
        self.score_rows = nn.Parameter(base.zeros(base.d_out))
        self.score_columns = nn.Parameter(base.zeros(base.d_in))
        self.entries, self.replaces_weight = base.d_out * base.d_in, True
        self.register_buffer("removed", torch.zeros((), dtype=torch.int64, device=base.device))

    def reset(self, generator: torch.Generator) -> None:
        """U and A_m at N(0, 1), everything else at zero; nothing is pruned."""
        for random in (self.lora_B, self.score_B):
            write_normal(random, 1.0, generator)
        for zero in (self.lora_A, self.score_A, self.score_rows, self.score_columns):
            write_zeros(zero)
        self.removed.zero_()

    def prune(self, sparsity: float) -> None:
        """Let the fraction v of each matrix be zero from now on, or what is zero already where that is more."""
        self.removed.clamp_(min=math.floor(sparsity * self.entries + 1e-9))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """M * What."""
        own = self.lora_B, self.lora_A, self.score_B, self.score_A, self.score_rows, self.score_columns
        U, V, A, B, R, C = (p.to(weight.dtype) for p in own)
        changed = plus_product(weight, U, V, self.scaling)
        scores = plus_product(changed.abs(), A, B, self.score_scaling)
        scores = scores + self.line_scaling * (R[..., :, None] + C[..., None, :])
        # the difference is zero: its gradient alone goes on to the scores
        mask = kept_mask(scores.detach(), self.removed) + (scores - scores.detach())
        return changed * mask

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """The layer with that weight, which is formed again in backward."""
        return forward_from_weight(base, x, self.merged_weight)

    def idle(self) -> frozenset[str]:
        """What starts at N(0, 1): beside a factor at zero its first changes are below rounding at usual rates."""
        return frozenset(("lora_B", "score_B"))

    def factor_pairs(self) -> tuple[FactorPair, ...]:
        """Of the update and of the scores."""
        update = FactorPair("update", self.lora_A, self.lora_B, self.scaling)
        return update, FactorPair("scores", self.score_A, self.score_B, self.score_scaling)

    def extra_repr(self) -> str:
        """Rank and what is zero now for `print(model)`."""
        return f"rank={self.lora_A.shape[-2]}, {int(self.removed)} of {self.entries} entries zero"
