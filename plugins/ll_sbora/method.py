"""SBoRA: standard-basis low-rank adaptation. One factor selects inputs or outputs, the other trains.

Po et al., 2024, arXiv:2407.05413; the equations stand in `adapter.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_lightning.methods import LowRankFields, Method

if TYPE_CHECKING:
    from ll_sbora.adapter import SBoRAAdapter
    from lora_lightning.adapters.layers.base import BaseLayer


@dataclass(frozen=True, kw_only=True)
class SBoRA(LowRankFields, Method):
    """Low-rank update of which one factor selects columns or rows of the weight, drawn once (Po et al., 2024).

    It trains half of LoRA's numbers at equal rank. The authors take ranks 32 and 64 and alpha twice that.
    """

    paper: ClassVar[str] = "2407.05413"
    bibtex: ClassVar[str] = """@inproceedings{po2024sbora,
  title = {{SBoRA}: Low-Rank Adaptation with Regional Weight Updates},
  author = {Po, Lai-Man and Liu, Yuyang and Wu, Haoxuan and Zhang, Tianqi and Yu, Wing-Yin and Wang, Zhuohan and
            Jiang, Zeyu and Li, Kun},
  booktitle = {International Conference on Neural Information Processing},
  year = {2024},
  note = {arXiv:2407.05413}
}"""
    export: ClassVar[str] = "exact LoRA"

    fixed: Literal["A", "B"] = "A"
    """The factor that selects and stays. "A" (SBoRA-FA) trains `rank` columns of the weight, one an input; "B"
    (SBoRA-FB) trains `rank` rows, one an output. The paper's better results are those of "A"."""

    def build(self, base: BaseLayer) -> SBoRAAdapter:
        """The trained factor and the positions that the other one selects."""
        from ll_sbora.adapter import SBoRAAdapter

        return SBoRAAdapter(base, rank=self.rank, scaling=self.scaling, fixed=self.fixed, dropout=self.dropout)
