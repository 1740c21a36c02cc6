"""MoRA: high-rank updating by one square matrix in the place of two thin ones; ReMoRA: the same in stages.

Jiang et al., 2024, arXiv:2405.12130; the equations stand in `functional.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import Method, check_fields

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from ll_mora.adapter import MoRAAdapter
    from lora_lightning.adapters.layers.base import BaseLayer


@dataclass(frozen=True, kw_only=True)
class MoRA(Method):
    """A square matrix between maps without parameters, whose update has a high rank (Jiang et al., 2024).

    It trains about as many numbers as LoRA of the same rank and has no factor alpha. With `fold_every` it is ReMoRA.
    """

    paper: ClassVar[str] = "2405.12130"
    bibtex: ClassVar[str] = """@article{jiang2024mora,
  title = {{MoRA}: High-Rank Updating for Parameter-Efficient Fine-Tuning},
  author = {Jiang, Ting and Huang, Shaohan and Luo, Shengyue and Zhang, Zihan and Huang, Haizhen and Wei, Furu and
            Deng, Weiwei and Sun, Feng and Zhang, Qi and Wang, Deqing and Zhuang, Fuzhen},
  journal = {arXiv preprint arXiv:2405.12130},
  year = {2024}
}"""
    run_wide: ClassVar[tuple[str, ...]] = ("fold_every", "rewarm_steps")

    rank: int = 8
    """Rank of the LoRA with as many trained numbers; the matrix has about sqrt(rank * (d_in + d_out)) rows."""
    maps: Literal["rotation", "modulo", "groups", "groups-modulo", "modulo-groups"] = "rotation"
    """How the matrix meets inputs and outputs. "rotation" uses it on each block of the input, turned (the authors'
    type 6, for small ranks). The others add up inputs that share an entry and repeat outputs: those of equal remainder
    ("modulo", type 1, for ranks such as 256), neighbours ("groups", type 2), or one of each (types 3 and 4)."""
    dropout: float = 0.0
    """Probability of dropping entries of the update's input while training."""
    all_maps: bool = False
    """Whether stages of a cascade go through all four ways to share entries; else through two in turn: "modulo" and
    "groups", or the two mixtures."""
    fold_every: int | None = None
    """ReMoRA: optimizer steps after which the update is folded, the matrix starts again and other maps are taken; null
    for never. The authors pretrain with 2000."""
    rewarm_steps: int = 50
    """Steps over which the rate rises again after a fold."""

    def __post_init__(self) -> None:
        check_fields(self)
        check(self.rank >= 1, self, "rank", "it must be at least 1. Rank of the LoRA with as many numbers; 8 is usual.")
        check(0 <= self.dropout < 1, self, "dropout", "it must lie in [0, 1). Probability of a drop.")
        whole = self.fold_every is None or (type(self.fold_every) is int and self.fold_every >= 2)
        check(whole, self, "fold_every", "it must be a whole number of at least 2, or null.")
        rule = "updates of rotations that are folded add up to one matrix of the same form; take maps=modulo, or null."
        check(self.fold_every is None or self.maps != "rotation", self, "fold_every", rule)
        check(self.rewarm_steps >= 1, self, "rewarm_steps", "it must be at least 1; the authors use 50.")

    def build(self, base: BaseLayer) -> MoRAAdapter:
        """The matrix and its maps."""
        from ll_mora.adapter import MoRAAdapter

        return MoRAAdapter(base, self.rank, self.maps, all_maps=self.all_maps, dropout=self.dropout)

    def callbacks(self) -> Sequence[Callback]:
        """For ReMoRA the cascade; adapters take other maps where it begins a stage."""
        if self.fold_every is None:
            return []
        from lora_lightning.callbacks.cascade import Cascade

        return [Cascade(stage_steps=self.fold_every, lr="rewarm", rewarm_steps=self.rewarm_steps)]
