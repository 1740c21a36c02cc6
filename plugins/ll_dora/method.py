"""DoRA: weight-decomposed low-rank adaptation. A weight's row norms train beside a low-rank change of its rows.

Liu et al., 2024, arXiv:2402.09353, section 4; the equations stand in `functional.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import Adapters, Method, ScaledLowRankFields, check_low_rank

if TYPE_CHECKING:
    from ll_dora.adapter import DoRAAdapter
    from lora_lightning.adapters.base import GroupSpec
    from lora_lightning.adapters.layers.base import BaseLayer


@dataclass(frozen=True, kw_only=True)
class DoRA(ScaledLowRankFields, Method):
    """Low-rank change of direction and trained row norms of frozen weights (Liu et al., 2024).

    The paper takes ranks 16 and 32, alpha twice that and dropout 0.05; half of LoRA's rank often suffices. With dropout
    a training step multiplies with the frozen weight twice.
    """

    paper: ClassVar[str] = "2402.09353"
    bibtex: ClassVar[str] = """@inproceedings{liu2024dora,
  title = {{DoRA}: Weight-Decomposed Low-Rank Adaptation},
  author = {Liu, Shih-Yang and Wang, Chien-Yi and Yin, Hongxu and Molchanov, Pavlo and Wang, Yu-Chiang Frank
            and Cheng, Kwang-Ting and Chen, Min-Hung},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  note = {arXiv:2402.09353}
}"""
    export: ClassVar[str] = "native"
    peft_type: ClassVar[str] = "LORA"
    peft_options: ClassVar[Mapping[str, object]] = {"use_dora": True}

    detach_norm: bool = True
    """Treat the row norm as a constant in backward, as section 4.3 of the paper does to save memory. False gives the
    full gradient, which has no component along a row."""
    mode: Literal["full", "magnitude"] = "full"
    """"magnitude" trains the row norms alone (section 5.6): no factors, so rank, alpha and detach_norm have no
    effect, and dropout must be 0."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check(type(self.detach_norm) is bool, self, "detach_norm", "it must be true or false.")
        check(
            self.mode == "full" or not self.dropout,
            self,
            "dropout",
            'it must be 0 where mode is "magnitude": there is no low-rank part whose input could be dropped.',
        )

    def build(self, base: BaseLayer) -> DoRAAdapter:
        """A magnitude, and a pair of factors unless the magnitude trains alone."""
        from ll_dora.adapter import DoRAAdapter

        rank = self.rank if self.mode == "full" else 0
        return DoRAAdapter(base, rank=rank, scaling=self.scaling, dropout=self.dropout, detach_norm=self.detach_norm)

    def param_groups(self, adapters: Adapters) -> dict[str, GroupSpec]:
        """Groups "A", "B" and "magnitude"; decay would pull magnitudes to zero instead of to their start."""
        from lora_lightning.adapters.base import GroupSpec, pair_groups

        groups = pair_groups(adapters)
        magnitudes = groups.pop("other")
        return groups | {"magnitude": GroupSpec(params=magnitudes.params, weight_decay=0.0)}

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """Mean dM and dD over layers, and how many rows of the base weights are zero."""
        from ll_dora.adapter import survey

        return survey(adapters)
