"""CE-LoRA: computation-efficient low-rank adaptation.

Chen et al., 2025, arXiv:2502.01378: approximated matrix multiplication and Double-LoRA.

    forward     y  = W x + b + s B (A x)                              exact, as LoRA's
    backward    dx = G_S W_S + (G_rest B0_rest) A0 + s (G B) A        S: the kept output channels, rest: all others

    paper      here                 shape (out, in as nn.Linear stores it)
    W          weight               (d_out, d_in)    frozen
    A, B       lora_A, lora_B       (rank, d_in), (d_out, rank)
    p          kept                 fraction of output channels in S
    r0         svd_rank             width of the split W = B0 A0 + W_s

Departs from the paper: the index set is counted in optimizer steps, and chosen by gradient norms of each column, which
the released code reduces to one number; see `functional.py` for the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import Adapters, Method, ScaledLowRankFields, check_low_rank

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from ll_ce_lora.adapter import CELoRAAdapter
    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.low_rank import LowRankAdapter


@dataclass(frozen=True, kw_only=True)
class CELoRA(ScaledLowRankFields, Method):
    """LoRA whose backward pass through frozen linear layers uses their most important channels (Chen et al., 2025).

    The authors' scripts take rank 16, alpha twice that, dropout 0.05 and the scaling rule "alpha/sqrt(r)".
    """

    paper: ClassVar[str] = "2502.01378"
    bibtex: ClassVar[str] = """@article{chen2025celora,
  title = {{CE-LoRA}: Computation-Efficient {LoRA} Fine-Tuning for Language Models},
  author = {Chen, Guanduo and He, Yutong and Hu, Yipeng and Yuan, Kun and Yuan, Binhang},
  journal = {arXiv preprint arXiv:2502.01378},
  year = {2025}
}"""
    export: ClassVar[str] = "exact LoRA"
    ranks: ClassVar[tuple[str, ...]] = ("rank", "svd_rank")

    kept: float = 0.65
    """Fraction of output channels that enter the gradient of a layer's input; 1.0 is exact. Set it per kind of layer by
    `overrides`: the authors keep 0.55 of v_proj and o_proj, 0.65 of up_proj and down_proj, and 1.0 of the others."""
    svd_rank: int = 7
    """Width r0 of the part of the frozen weight that stays exact for all channels; seven eighths of `rank` is usual,
    0 turns it off. Costs svd_rank * (d_in + d_out) numbers a layer that do not train."""
    every_n_steps: int = 200
    """Optimizer steps between two choices of the channels; the first is after step 1, which is exact, as is the first
    step of each stage of a cascade."""
    selection: Literal["top", "sample"] = "top"
    """"top" takes the channels of largest score (biased, less noise); "sample" draws them with probability by score and
    rescales, which is right on average over draws and offered for comparison."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check(
            0 <= self.kept <= 1,
            self,
            "kept",
            "it must lie in [0, 1]. Fraction of output channels; 0.65 is common, 1 exact.",
        )
        check(self.svd_rank >= 0, self, "svd_rank", "it must be at least 0. Seven eighths of rank is common.")
        check(
            self.kept > 0 or self.svd_rank > 0,
            self,
            "kept",
            "with svd_rank=0 it must be above 0, or no gradient at all would pass through the frozen weight.",
        )
        check(self.every_n_steps >= 1, self, "every_n_steps", "it must be at least 1. Optimizer steps; 200 is common.")

    def build(self, base: BaseLayer) -> CELoRAAdapter | LowRankAdapter:
        """One pair of factors, and what the cheap backward pass needs; stacked experts get LoRA's.

        Their product is taken inside the module that owns them, so its backward pass stays exact.
        """
        from ll_ce_lora.adapter import CELoRAAdapter
        from lora_lightning.adapters.low_rank import LowRankAdapter

        if base.kind == "experts":
            return LowRankAdapter(base, rank=self.rank, scaling=self.scaling, dropout=self.dropout)
        return CELoRAAdapter(
            base,
            rank=self.rank,
            scaling=self.scaling,
            dropout=self.dropout,
            kept=self.kept,
            svd_rank=self.svd_rank,
            every_n_steps=self.every_n_steps,
            selection=self.selection,
        )

    def callbacks(self) -> Sequence[Callback]:
        """The schedule that chooses the channels; period and fraction are each layer's own."""
        from ll_ce_lora.callback import RefreshIndex

        return [RefreshIndex()]

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """Operations a token beside plain LoRA's on the same layers, and how much faster a step could be at most."""
        from ll_ce_lora.cost import survey

        return survey(adapters)
