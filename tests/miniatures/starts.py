"""Ranks and starts from data and weights: EVA and PiSSA.

EVA    Paischer et al., 2024, arXiv:2410.07170     A: leading directions of inputs, ranks by explained variance
PiSSA  Meng et al., 2024, arXiv:2404.02948         A, B: leading singular triplets of W, which are taken off W

Departs from the papers: EVA's covariances are summed, where the paper updates principal components; no whitening.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lora_lightning.methods import Adapters, Method, Plan

if TYPE_CHECKING:
    from torch import nn

    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.low_rank import LowRankAdapter
    from lora_lightning.injection.probe import Probe


@dataclass(frozen=True, kw_only=True)
class EVA(Method):
    """Explained-variance adaptation: a common budget of ranks goes to the layers whose inputs need it."""

    rank: int = 4
    """Mean rank of a layer."""
    alpha: float = 4.0
    """Numerator of the scaling at the mean rank; the scaling is the same for every rank."""
    rho: float = 2.0
    """Largest rank of a layer over the mean one; 1 gives each layer the same."""
    calibration_batches: int = 2
    """Batches whose inputs are looked at."""

    def build(self, base: BaseLayer) -> LowRankAdapter:
        from lora_lightning.adapters.low_rank import LowRankAdapter

        return LowRankAdapter(base, rank=self.rank, scaling=self.alpha / self.rank)

    def probe_batches(self) -> int:
        return self.calibration_batches

    def plan(self, model: nn.Module, targets: Mapping[str, BaseLayer], probe: Probe) -> Plan:
        from lora_lightning.adapters.starts import covariance_start

        most = int(self.rho * self.rank)
        explained: list[tuple[float, str]] = []
        for path, covariance in probe.covariances().items():
            _, values = covariance_start(covariance, most)
            explained += [(float(value / values.sum()), path) for value in values[:most]]
        taken = [path for _, path in sorted(explained, reverse=True)[: self.rank * len(targets)]]
        ranks = {path: min(taken.count(path), targets[path].d_out) for path in targets}
        return {path: {"rank": rank, "alpha": self.alpha * rank / self.rank} for path, rank in ranks.items()}

    def initialize(self, adapters: Adapters, probe: Probe) -> None:
        from lora_lightning.adapters.base import write_values
        from lora_lightning.adapters.starts import covariance_start

        for path, covariance in probe.covariances(list(adapters)).items():
            adapter = cast("LowRankAdapter", adapters[path])
            write_values(adapter.lora_A, covariance_start(covariance, len(adapter.lora_A))[0])


@dataclass(frozen=True, kw_only=True)
class PiSSA(Method):
    """Principal singular values and vectors as the start of the factors."""

    rank: int = 2
    """Singular triplets that train."""
    alpha: float = 2.0
    """Numerator of the scaling; the start's product does not depend on it."""

    def build(self, base: BaseLayer) -> LowRankAdapter:
        from lora_lightning.adapters.low_rank import LowRankAdapter

        adapter = LowRankAdapter(base, rank=self.rank, scaling=self.alpha / self.rank)
        adapter.hold_start()
        return adapter

    def initialize(self, adapters: Adapters, probe: Probe) -> None:
        from lora_lightning.adapters.starts import weight_start

        for path, adapter in adapters.items():
            started: Any = adapter
            started.start_at(weight_start(probe.layers[path].weight(), started.lora_A.shape[-2], started.scaling))
