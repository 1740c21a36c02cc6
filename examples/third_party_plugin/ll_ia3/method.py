"""(IA)^3: a vector of scales on a layer's outputs or inputs.

Liu et al., 2022, arXiv:2205.05638, section 3.3; the equations stand in `adapter.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_lightning.methods import Adapters, Method, check_fields

if TYPE_CHECKING:
    from ll_ia3.adapter import IA3Adapter
    from lora_lightning.adapters.base import GroupSpec
    from lora_lightning.adapters.layers.base import BaseLayer


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Learned scales on activations of frozen layers (Liu et al., 2022)."""

    paper: ClassVar[str] = "2205.05638"
    bibtex: ClassVar[str] = """@inproceedings{liu2022fewshot,
  title = {Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning},
  author = {Liu, Haokun and Tam, Derek and Muqeeth, Mohammed and Mohta, Jay and Huang, Tenghao and Bansal, Mohit
            and Raffel, Colin},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022},
  note = {arXiv:2205.05638}
}"""

    side: Literal["output", "input"] = "output"
    """Which end of a layer is scaled: "output" for keys and values, "input" for the second layer of the feed-forward
    part (linear layers only). `overrides` sets it layer by layer."""

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self, base: BaseLayer) -> IA3Adapter:
        """One vector of scales."""
        from ll_ia3.adapter import IA3Adapter

        return IA3Adapter(base, side=self.side)

    def param_groups(self, adapters: Adapters) -> dict[str, GroupSpec]:
        """One group without weight decay, which would pull scales to zero."""
        return {name: replace(spec, weight_decay=0.0) for name, spec in super().param_groups(adapters).items()}
