"""SaRA: progressive sparse low-rank adaptation. The equations stand in `functional.py`.

Hu et al., 2024, arXiv:2409.06633.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lora_lightning.errors import check
from lora_lightning.methods import Adapters, Method, Plan, check_fields

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from torch import Tensor, nn

    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.weight_entries import EntriesAdapter
    from lora_lightning.injection.probe import Probe


@dataclass(frozen=True, kw_only=True)
class SaRA(Method):
    """The smallest entries of each weight train, held at a low rank by their nuclear norm (Hu et al., 2024).

    The authors' rate is 1e-3 exp(-350 threshold): 5e-4 at the default.
    """

    paper: ClassVar[str] = "2409.06633"
    bibtex: ClassVar[str] = """@inproceedings{hu2025sara,
  title = {{SaRA}: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation},
  author = {Hu, Teng and Zhang, Jiangning and Yi, Ran and Huang, Hongrui and Wang, Yabiao and Ma, Lizhuang},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  note = {arXiv:2409.06633}
}"""
    ranks: ClassVar[tuple[str, ...]] = ()
    run_wide: ClassVar[tuple[str, ...]] = ("threshold", "density", "nuclear", "reselect")

    threshold: float | None = 2e-3
    """Entries smaller than this train; 5e-4 to 2e-3 in the paper. A layer without any is left out."""
    density: float | None = None
    """In place of a threshold (null then): the fraction of each layer's entries that trains, its smallest, in (0, 1].
    Their number is known before weights are loaded."""
    entries: int = 0
    """How many entries of a layer train; 0 for those that `threshold` or `density` chooses, which is what you want:
    the number is written here for each layer when it is known."""
    nuclear: float = 5e-4
    """Weight lambda of the nuclear norms of the trained entries in the loss; 0 for none, which saves a decomposition of
    every adapted weight a step."""
    reselect: float = 0.5
    """When entries that have grown beyond the threshold stop training: up to 1 a fraction of the run's optimizer steps,
    from 2 on a step number, 0 for never."""

    def __post_init__(self) -> None:
        check_fields(self)
        one = (self.threshold is None) != (self.density is None)
        given = "both are given" if self.density is not None else "neither is"
        check(one, self, "threshold", f"one of threshold and density must be null, and {given}.")
        rule = "it must be above 0, or null. Size below which entries train; 0.002 is usual."
        check(self.threshold is None or self.threshold > 0, self, "threshold", rule)
        rule = "it must lie in (0, 1], or be null. Fraction of entries that train; 0.1 is usual."
        check(self.density is None or 0 < self.density <= 1, self, "density", rule)
        check(self.entries >= 0, self, "entries", "it must be at least 0, which takes what threshold or density say.")
        check(self.nuclear >= 0, self, "nuclear", "it must be at least 0; the authors take 0.0005.")
        check(self.reselect >= 0, self, "reselect", "it must be at least 0, which never chooses again.")

    def build(self, base: BaseLayer) -> EntriesAdapter:
        """The trained entries of one layer."""
        from lora_lightning.adapters.weight_entries import EntriesAdapter

        entries = self.entries
        if not entries and self.density is not None:
            entries = max(1, round(self.density * base.d_out * base.d_in * (base.lead[0] if base.lead else 1)))
        return EntriesAdapter(base, entries, self.threshold)

    def plan(self, model: nn.Module, targets: Mapping[str, BaseLayer], probe: Probe) -> Plan:  # noqa: ARG002
        """The number of entries of each layer below the threshold; a layer without any is left out."""
        from lora_lightning.adapters.weight_entries import number_below

        if self.threshold is None or self.entries:
            return {}
        counts = {path: number_below(base, self.threshold) for path, base in targets.items()}
        return {path: {"entries": count} if count else {"rank": 0} for path, count in counts.items()}

    def penalty(self, adapters: Adapters) -> Tensor | None:
        """The nuclear norms, weighted."""
        from ll_sara.functional import norms

        return self.nuclear * norms(adapters.values()) if self.nuclear else None

    def callbacks(self) -> Sequence[Callback]:
        """What chooses again; none without a moment."""
        from ll_sara.callback import Reselection

        return [Reselection(self.reselect)] if self.reselect else []

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """Entries of all layers, and how many of them train still."""
        own = [cast("EntriesAdapter", adapter) for adapter in adapters.values()]
        live = sum(int(adapter.live.sum()) for adapter in own)
        return {"entries": sum(adapter.live.numel() for adapter in own), "live_entries": live}
