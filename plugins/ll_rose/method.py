"""RoseLoRA: row- and column-wise sparse low-rank adaptation.

Wang et al., 2024, arXiv:2406.10777, sections 3.2 and 3.3.

    W' = W + s B A,   at most a fraction tau of each row of A and of each column of B is non-zero at the end

    paper        here                    shape (out, in as nn.Linear stores it)
    W0           weight                  (d_out, d_in)   frozen
    A, B         lora_A, lora_B          (rank, d_in), (d_out, rank)
    tau          1 - sparsity            density: fraction of entries kept
    t_i, t_f     start, end              optimizer steps between which tau falls from 1
    beta         beta                    smoothing of the sensitivity |w dL/dw|

Departs from the paper: the update has LoRA's factor s = alpha / rank (the paper has none); the optimizer is the run's,
not plain SGD; gradients are read before clipping; the first ranking is at step 2 at the earliest, because at step 1
every sensitivity is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_lightning.methods import (
    Adapters,
    LowRankFields,
    Method,
    SparsityFields,
    check_low_rank,
    check_sparsity,
    field_names,
    values_of,
)

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.low_rank import LowRankAdapter


@dataclass(frozen=True, kw_only=True)
class RoseLoRA(SparsityFields, LowRankFields, Method):
    """Low-rank update whose factors become sparse by row and column while training (Wang et al., 2024).

    The product's density is at most the rank times the squared density of the factors. The authors edit with alpha four
    times the rank.
    """

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
    run_wide: ClassVar[tuple[str, ...]] = field_names(SparsityFields)

    def __post_init__(self) -> None:
        check_low_rank(self)
        check_sparsity(self)

    def build(self, base: BaseLayer) -> LowRankAdapter:
        """One pair of factors with a mask on each."""
        from lora_lightning.adapters.low_rank import LowRankAdapter

        return LowRankAdapter(base, rank=self.rank, scaling=self.scaling, dropout=self.dropout, entry_masks=True)

    def callbacks(self) -> Sequence[Callback]:
        """The schedule that prunes."""
        from lora_lightning.callbacks.sparsity import SparsitySchedule

        return [SparsitySchedule(**values_of(self, SparsityFields))]

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """Surviving entries, and the density of the products against the paper's bound."""
        from ll_rose.functional import survey

        return survey(adapters)
