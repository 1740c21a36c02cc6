"""COLA: chain of LoRA, efficient fine-tuning by residual learning.

Xia, Qin and Hazan, 2024, arXiv:2401.04151.

    at the end of each stage:   W <- W + s B A,   A ~ init,   B = 0,   moments of A and B forgotten

    paper          here            meaning
    knot           end of a stage  of stage_epochs or stage_steps
    r of a stage   stage_ranks     rank components that train; a mask, so the scaling stays alpha / rank

Departs from the paper: a chain with falling ranks masks rank components, where the paper makes new modules of another
rank; s stays that of the full rank. Whether the rate decays over the run or over each stage is not said there; `lr`
chooses. A bias cannot train, since no fold holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lora_lightning.stages import StagedMethod


@dataclass(frozen=True, kw_only=True)
class COLA(StagedMethod):
    """A chain of low-rank updates, each merged before the next begins at zero (Xia et al., 2024)."""

    paper: ClassVar[str] = "2401.04151"
    bibtex: ClassVar[str] = """@article{xia2024cola,
  title = {Chain of {LoRA}: Efficient Fine-tuning of Language Models via Residual Learning},
  author = {Xia, Wenhan and Qin, Chengwei and Hazan, Elad},
  journal = {arXiv preprint arXiv:2401.04151},
  year = {2024}
}"""
