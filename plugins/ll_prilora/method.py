"""PRILoRA: pruned and rank-increasing low-rank adaptation.

Benedek and Wolf, 2024, arXiv:2401.11316.

    r_l = round(r_s + (r_f - r_s) l / (L - 1)),   W' = W + s B A
    every K optimizer steps the entries of A with the least |A_ij| n_j become zero, and train on

    paper      here                  shape
    l, L       number, count         of the block that a layer lies in, and of all blocks with adapted layers
    r_s, r_f   (1 -+ ramp) rank      ranks of the first and of the last block; their mean is `rank`
    n_j        norms                 (d_in,)   moving average of the norm of input j, memory `beta`
    A, B       lora_A, lora_B        (r_l, d_in), (d_out, r_l)

Departs from the paper: n_j of a step is the root of the mean square over its tokens, not of the sum, so that neither a
recomputed forward nor the number of tokens changes it; further readings are in the card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import Adapters, LowRankFields, Method, Plan, check_low_rank

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from torch import nn

    from lora_lightning.adapters.input_squares import WatchedPair
    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.injection.probe import Probe


@dataclass(frozen=True, kw_only=True)
class PRILoRA(LowRankFields, Method):
    """LoRA with ranks that rise with depth, whose A loses its least important entries again and again.

    An entry's importance is its size times the averaged norm of the input it is multiplied with. What is set to zero
    goes on training, so that it can grow back (Benedek and Wolf, 2024).
    """

    paper: ClassVar[str] = "2401.11316"
    bibtex: ClassVar[str] = """@inproceedings{benedek2024prilora,
  title = {{PRILoRA}: Pruned and Rank-Increasing Low-Rank Adaptation},
  author = {Benedek, Nadav and Wolf, Lior},
  booktitle = {Findings of the Association for Computational Linguistics: EACL},
  year = {2024},
  note = {arXiv:2401.11316}
}"""
    export: ClassVar[str] = "exact LoRA"
    run_wide: ClassVar[tuple[str, ...]] = ("ramp", "sparsity", "every_n_steps", "beta", "scope")
    plans_by_shape: ClassVar[bool] = True

    rank: int = 8
    """Mean rank of the blocks."""
    ramp: float = 0.5
    """How far ranks rise with depth: from (1 - ramp) to (1 + ramp) times `rank`. The paper's 4 to 12: 8 and 0.5."""
    scaling_by: Literal["rank", "mean"] = "rank"
    """Whether the scaling of a layer is alpha over its own rank, or over the mean rank, the same for all."""
    sparsity: float = 0.5
    """Fraction of A that an event sets to zero, in [0, 1); 0 for none."""
    every_n_steps: int = 40
    """Optimizer steps between two events."""
    beta: float = 0.9
    """Memory of the averaged norms of inputs."""
    scope: Literal["row", "matrix"] = "row"
    """Where entries compete: within each row of A, or in all of it."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check(0 <= self.ramp < 1, self, "ramp", "it must lie in [0, 1). 0.5 gives ranks from half to one and a half.")
        check(
            0 <= self.sparsity < 1, self, "sparsity", "it must lie in [0, 1). Fraction of A set to zero; 0.5 is usual."
        )
        check(self.every_n_steps >= 1, self, "every_n_steps", "it must be at least 1; 40 is usual.")
        check(0 <= self.beta < 1, self, "beta", "it must lie in [0, 1). Memory of the averaged norms; 0.9 is usual.")

    def build(self, base: BaseLayer) -> WatchedPair:
        """One pair of factors, and a count of its inputs."""
        from lora_lightning.adapters.input_squares import WatchedPair

        return WatchedPair(base, rank=self.rank, scaling=self.scaling, dropout=self.dropout)

    def plan(self, model: nn.Module, targets: Mapping[str, BaseLayer], probe: Probe) -> Plan:  # noqa: ARG002
        """Rank and alpha of each layer, from the place of its block; stacks of blocks are counted one by one."""
        from lora_lightning.models.blocks import blocks_of

        found = {}
        for path, block in blocks_of(model, targets).items():
            rank = rank_at(self.rank, self.ramp, block.number, block.total)
            found[path] = {"rank": rank, "alpha": self.alpha * (rank / self.rank if self.scaling_by == "mean" else 1)}
        return found

    def callbacks(self) -> Sequence[Callback]:
        """What prunes; none without sparsity."""
        from ll_prilora.callback import InputNormPruning

        if not self.sparsity:
            return []
        return [InputNormPruning(self.sparsity, self.every_n_steps, self.beta, self.scope)]

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """Rank of each layer, and the fraction of A that is zero now."""
        factors = {path: pair.lora_A for path, adapter in adapters.items() for pair in adapter.factor_pairs()}
        zeros = sum(int((A == 0).sum()) for A in factors.values())
        ranks = {path: A.shape[-2] for path, A in factors.items()}
        return {"ranks": ranks, "zeros_of_A": zeros / max(sum(A.numel() for A in factors.values()), 1)}


def rank_at(rank: int, ramp: float, number: int, count: int) -> int:
    """Rank of block `number` of `count`: from (1 - ramp) rank to (1 + ramp) rank, and at least 1; halves round up.

    Example:
        >>> [rank_at(8, 0.5, l, 12) for l in range(12)]
        [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]
    """
    depth = 2 * number / (count - 1) - 1 if count > 1 else 0.0
    return max(1, math.floor(rank * (1 + ramp * depth) + 0.5 + 1e-9))
