"""RoseLoRA: row- and column-wise sparse low-rank adaptation.

Wang et al., 2024, arXiv:2406.10777, sections 3.2 and 3.3.

    W' = W + s B A,   at most a share tau of each row of A and of each column of B is non-zero at the end

    paper        here                    shape (out, in as nn.Linear stores it)
    W0           weight                  (d_out, d_in)   frozen
    A, B         lora_A, lora_B          (rank, d_in), (d_out, rank)
    tau          1 - sparsity            share of entries kept
    t_i, t_f     start, end              optimizer steps between which tau falls from 1
    beta         beta                    smoothing of the sensitivity |w dL/dw|

Departs from the paper: the update has LoRA's factor s = alpha / rank (the paper has none); the optimizer is the run's,
not plain SGD; gradients are read before clipping; the first ranking is at step 2 at the earliest, because at step 1
every sensitivity is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import Adapters, Method, check_low_rank

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.low_rank import LowRankAdapter


@dataclass(frozen=True, kw_only=True)
class RoseLoRA(Method):
    """Low-rank update whose factors become sparse by row and column while training (Wang et al., 2024)."""

    paper: ClassVar[str] = "2406.10777"
    bibtex: ClassVar[str] = """@inproceedings{wang2024roselora,
  title = {{RoseLoRA}: Row and Column-wise Sparse Low-rank Adaptation of Pre-trained Language Model for Knowledge
           Editing and Fine-tuning},
  author = {Wang, Haoyu and Liu, Tianci and Li, Ruirui and Cheng, Monica and Zhao, Tuo and Gao, Jing},
  booktitle = {Empirical Methods in Natural Language Processing},
  year = {2024},
  note = {arXiv:2406.10777}
}"""
    export: ClassVar[str] = "exact LoRA"
    run_wide: ClassVar[tuple[str, ...]] = ("sparsity", "beta", "start", "end", "keep_rule", "first_score", "clamp")

    rank: int = 8
    """Inner width r of the update; the product's density is at most r times the squared kept share."""
    alpha: float = 16.0
    """Numerator of scaling = alpha / rank. The authors edit with alpha = 4 * rank."""
    dropout: float = 0.0
    """Probability of dropping entries of the update's input while training."""
    sparsity: float = 0.8
    """Share of zeros in each row of A and each column of B at the end, so 0.9 keeps 10%. Editing uses 0.95."""
    beta: float = 0.8
    """Memory of the averaged sensitivity; results are not sensitive to it."""
    start: float = 0.1
    """When pruning starts: up to 1 a share of the run's optimizer steps, from 2 on a step number."""
    end: float = 0.8
    """When the final sparsity is reached, in the same unit; the rest of the run trains the survivors."""
    keep_rule: Literal["floor", "ceil", "official"] = "floor"
    """How the kept share becomes a count: "floor" never exceeds it, "official" is the released code's ceil + 1."""
    first_score: Literal["zero", "gradient"] = "zero"
    """Start of the average: zero, as the paper reads, or the first sensitivity, as in the released code."""
    clamp: float | None = None
    """Largest magnitude of any entry once pruning has begun; the released editing code uses 0.003."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check(
            0 <= self.sparsity < 1,
            self,
            "sparsity",
            "it must lie in [0, 1). Fraction of entries set to zero, so 0.9 keeps 10%.",
        )
        check(
            0 <= self.beta < 1, self, "beta", "it must lie in [0, 1). Memory of the averaged sensitivity; 0.8 is usual."
        )
        check(self.start >= 0, self, "start", "it must be at least 0. A share of the run's steps, or a step from 2 on.")
        comparable = (self.start > 1) == (self.end > 1)
        check(not comparable or self.start < self.end, self, "end", f"it must come after start, which is {self.start}.")
        check(self.clamp is None or self.clamp > 0, self, "clamp", "it must be above 0, or null for no clamp.")

    @property
    def scaling(self) -> float:
        """Factor s on the product B A."""
        return self.alpha / self.rank

    def build(self, base: BaseLayer) -> LowRankAdapter:
        """One pair of factors with a mask on each."""
        from lora_lightning.adapters.low_rank import LowRankAdapter

        return LowRankAdapter(base, rank=self.rank, scaling=self.scaling, dropout=self.dropout, entry_masks=True)

    def callbacks(self) -> Sequence[Callback]:
        """The schedule that prunes."""
        from lora_lightning.callbacks.sparsity import SparsitySchedule

        return [
            SparsitySchedule(
                sparsity=self.sparsity,
                beta=self.beta,
                start=self.start,
                end=self.end,
                keep_rule=self.keep_rule,
                first_score=self.first_score,
                clamp=self.clamp,
            )
        ]

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """Surviving entries, and the density of the products against the paper's bound."""
        from ll_rose.functional import survey

        return survey(adapters)
