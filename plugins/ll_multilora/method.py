"""MultiLoRA: several low-rank updates in parallel, each with a learned gate that starts at zero.

Wang et al., 2023, arXiv:2311.11501; the equations stand in `adapter.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import Adapters, LowRankFields, Method, check_low_rank

if TYPE_CHECKING:
    from ll_multilora.adapter import MultiLoRAAdapter
    from lora_lightning.adapters.base import GroupSpec
    from lora_lightning.adapters.layers.base import BaseLayer


@dataclass(frozen=True, kw_only=True)
class MultiLoRA(LowRankFields, Method):
    """Parallel low-rank updates whose learned gates spread the change over more directions (Wang et al., 2023).

    It trains as many numbers as LoRA of `modules` times the rank, and the gates. Not the serving of many adapters in
    one batch, which goes by the same name.
    """

    paper: ClassVar[str] = "2311.11501"
    bibtex: ClassVar[str] = """@article{wang2023multilora,
  title = {{MultiLoRA}: Democratizing {LoRA} for Better Multi-Task Learning},
  author = {Wang, Yiming and Lin, Yu and Zeng, Xiaodong and Zhang, Guannan},
  journal = {arXiv preprint arXiv:2311.11501},
  year = {2023}
}"""
    export: ClassVar[str] = "exact LoRA"

    rank: int = 8
    """Inner width of one module; all of them together have `modules` times as much."""
    modules: int = 3
    """Low-rank updates on each layer, n."""
    gate: Literal["vector", "scalar"] = "vector"
    """What a module's gate is: one number an output of the layer, or one number."""
    gate_start: Literal["zero", "mean"] = "zero"
    """"zero" starts gates at 0 and both factors at random, as the paper does: gates alone move in the first step.
    "mean" starts gates at 1/n and one factor at zero, as in LoRA."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check(self.modules >= 1, self, "modules", "it must be at least 1; 3 to 5 are common.")

    def build(self, base: BaseLayer) -> MultiLoRAAdapter:
        """Stacked pairs of factors and their gates."""
        from ll_multilora.adapter import MultiLoRAAdapter

        zeros = self.gate_start == "zero"
        return MultiLoRAAdapter(
            base, self.modules, self.rank, self.scaling, dropout=self.dropout, gate=self.gate, zeros=zeros
        )

    def param_groups(self, adapters: Adapters) -> dict[str, GroupSpec]:
        """Groups "A", "B" and "gate"; decay would pull gates to zero, where factors have no gradient."""
        from lora_lightning.adapters.base import GroupSpec, pair_groups

        groups = pair_groups(adapters)
        return groups | {"gate": GroupSpec(params=groups.pop("other").params, weight_decay=0.0)}

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """How much of the updates lies in as many leading directions as one module has."""
        from ll_multilora.adapter import energies

        return energies(adapters)
