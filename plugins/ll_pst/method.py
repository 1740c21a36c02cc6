"""PST: parameter-efficient sparsity training. The equations stand in `adapter.py`.

Li et al., 2022, arXiv:2205.11005.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lora_lightning.errors import check
from lora_lightning.methods import Adapters, Method, check_fields

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from ll_pst.adapter import PSTAdapter
    from lora_lightning.adapters.base import GroupSpec
    from lora_lightning.adapters.layers.base import BaseLayer


@dataclass(frozen=True, kw_only=True)
class PST(Method):
    """Prunes a model while it is fine-tuned, by scores of which only small parts train (Li et al., 2022).

    What comes out is a sparse model; the authors take AdamW at 3e-5 to 5e-5 without weight decay.
    """

    paper: ClassVar[str] = "2205.11005"
    bibtex: ClassVar[str] = """@inproceedings{li2022pst,
  title = {Parameter-Efficient Sparsity for Large Language Models Fine-Tuning},
  author = {Li, Yuchao and Luo, Fuli and Tan, Chuanqi and Wang, Mengdi and Huang, Songfang and Li, Shen
            and Bai, Junjie},
  booktitle = {International Joint Conference on Artificial Intelligence},
  year = {2022},
  note = {arXiv:2205.11005}
}"""
    ranks: ClassVar[tuple[str, ...]] = ("rank", "score_rank")
    run_wide: ClassVar[tuple[str, ...]] = ("sparsity", "start", "end")

    rank: int = 8
    """Inner width of the update of the weight."""
    score_rank: int = 8
    """Inner width of the low-rank part of the scores."""
    sparsity: float = 0.9
    """Fraction of zeros in each adapted weight at the end, in [0, 1); the paper also takes 0.5."""
    start: float = 0.1
    """When pruning starts: up to 1 a fraction of the run's optimizer steps, from 2 on a step number."""
    end: float = 0.7
    """When the final sparsity is reached, in the same unit; the rest of the run trains what is left."""
    scaling: float = 1.0
    """Factor beta on the update of the weight."""
    score_scaling: float = 1.0
    """Factor on the low-rank part of the scores; 0 takes it out."""
    line_scaling: float = 1.0
    """Factor on what the scores have by row and by column; 0 takes it out."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("rank", "score_rank"):
            check(getattr(self, name) >= 1, self, name, "it must be at least 1. Inner width of a product; 8 is usual.")
        check(0 <= self.sparsity < 1, self, "sparsity", "it must lie in [0, 1). Fraction of zeros; 0.9 keeps 10%.")
        check(self.start >= 0, self, "start", "it must be at least 0. A fraction of the run's steps, or a step from 2.")
        comparable = (self.start > 1) == (self.end > 1)
        rule = f"it must come after start, which is {self.start}."
        check(not comparable or self.start < self.end, self, "end", rule)
        check(self.scaling > 0, self, "scaling", "it must be above 0; 1 is usual.")
        for name in ("score_scaling", "line_scaling"):
            check(getattr(self, name) >= 0, self, name, "it must be at least 0; 1 is usual.")

    def build(self, base: BaseLayer) -> PSTAdapter:
        """The pruned weight of one layer."""
        from ll_pst.adapter import PSTAdapter

        scalings = self.scaling, self.score_scaling, self.line_scaling
        return PSTAdapter(base, self.rank, self.score_rank, scalings)

    def param_groups(self, adapters: Adapters) -> dict[str, GroupSpec]:
        """Sides of both products and the rest, all without weight decay."""
        groups = super().param_groups(adapters)
        return {name: dataclasses.replace(group, weight_decay=0.0) for name, group in groups.items()}

    def callbacks(self) -> Sequence[Callback]:
        """The schedule; none without sparsity."""
        from ll_pst.callback import PSTSchedule

        return [PSTSchedule(self.sparsity, self.start, self.end)] if self.sparsity else []

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """Fraction of entries that are zero now, of all adapted weights."""
        own = [cast("PSTAdapter", adapter) for adapter in adapters.values()]
        zeros = sum(int(adapter.removed) for adapter in own)
        return {"zeros": zeros / max(sum(adapter.entries for adapter in own), 1)}
