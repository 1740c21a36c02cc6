"""Start: settings of where the factors of a pair start, where it is not at random. Imports no torch, no Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.pair import PairAdapter
    from lora_lightning.adapters.starts import Factors
    from lora_lightning.injection.probe import Probe
    from lora_lightning.methods import Plan


@dataclass(frozen=True, kw_only=True)
class Start:
    """Settings of where the factors of a pair start: the field `init` of methods that have such factors.

    A start is taken off again, y = base(x) + (s B A x - s B0 A0 x), unless `subtracts` is False; the layer's weight is
    never written. Functions for starts: `adapters.starts`. One that reads data answers `factors`, others `of_layer`.

    Class facts:
        paper: arXiv identifier.
        bibtex: BibTeX entry of the paper, printed by `cite`.
        subtracts: whether the product of the start is taken off, so that the model begins as it was.
    """

    paper: ClassVar[str] = ""
    bibtex: ClassVar[str] = ""
    subtracts: ClassVar[bool] = True

    def probe_batches(self) -> int:
        """How many calibration batches `plan` and `factors` read; 0: none."""
        return 0

    def plan(self, method: Any, targets: Mapping[str, BaseLayer], probe: Probe) -> Plan:  # noqa: ARG002
        """As `Method.plan`, of fields of `method`, which has `LowRankFields`; what the method plans wins over it."""
        return {}

    def factors(self, adapters: Mapping[str, PairAdapter], probe: Probe) -> Iterator[tuple[str, Factors]]:
        """Start values by layer path, one layer at a time; a side that is None stays as the method starts it.

        Asked as `Method.initialize` is.
        """
        for path, adapter in adapters.items():
            yield path, self.of_layer(path, probe.layers[path].weight().detach(), adapter)

    def of_layer(self, path: str, weight: Tensor, adapter: PairAdapter) -> Factors:
        """Start values of the layer at `path`, whose weight is (d_out, d_in)."""
        raise NotImplementedError("a start answers `of_layer`, or `factors`")
