"""EVA: explained-variance adaptation. A starts at the principal directions of a layer's inputs, ranks follow them.

Paischer et al., 2024, arXiv:2410.07170.

    C_l = mean (x - m)(x - m)^T over the tokens that reach layer l = sum_i v_i u_i u_i^T
    A0 = (u_1, ..., u_r)^T,   B0 = 0
    ranks: the r * layers largest of all v_li / sum_j v_lj, at most rho * r of each layer

    paper   here        meaning
    rho     rho         most components of a layer, over the mean rank
    tau     -           the paper adds batches until components stay; here `batches` of them are read

Departs from the paper: covariances are summed in float64 and decomposed once, where the paper updates a truncated
decomposition batch by batch until it converges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_lightning.errors import check
from lora_lightning.methods import check_fields
from lora_lightning.start_values import Start

if TYPE_CHECKING:
    from torch import Tensor

    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.pair import PairAdapter
    from lora_lightning.adapters.starts import Factors
    from lora_lightning.injection.probe import Probe
    from lora_lightning.methods import Plan


@dataclass(frozen=True, kw_only=True)
class EVA(Start):
    """The first factor starts at the principal directions of the inputs, and ranks go where these explain most.

    Paischer et al., 2024. The second factor starts at zero, so that nothing is taken off.
    """

    paper: ClassVar[str] = "2410.07170"
    bibtex: ClassVar[str] = """@article{paischer2024eva,
  title = {Parameter Efficient Fine-tuning via Explained Variance Adaptation},
  author = {Paischer, Fabian and Hauzenberger, Lukas and Schmied, Thomas and Alkin, Benedikt and Deisenroth, Marc Peter
            and Hochreiter, Sepp},
  journal = {arXiv preprint arXiv:2410.07170},
  year = {2024}
}"""
    subtracts: ClassVar[bool] = False

    batches: int = 8
    """Training batches whose inputs are looked at."""
    rho: float = 2.0
    """Largest rank of a layer over the method's rank; 1 leaves every layer its rank."""
    whiten: bool = False
    """Divide each direction by the root of its singular value, so that strong ones start smaller."""
    adjust_alpha: bool = True
    """Keep the scaling alpha / rank of the method on layers of other ranks."""

    def __post_init__(self) -> None:
        check_fields(self)
        check(self.batches >= 1, self, "batches", "it must be at least 1; 8 to 32 are usual.")
        check(self.rho >= 1, self, "rho", "it must be at least 1. Largest rank over the mean one; 2 is usual.")

    def probe_batches(self) -> int:
        """Those of `batches`."""
        return self.batches

    def plan(self, method: Any, targets: Mapping[str, BaseLayer], probe: Probe) -> Plan:
        """Ranks by explained variance; a layer whose inputs explain nothing more gets none."""
        if self.rho == 1:
            return {}
        shares = [
            (float(value), path)
            for path, (_, values) in self._directions(list(targets), probe)
            for value in (values / values.sum())[: int(self.rho * method.rank)]
        ]
        taken = [path for _, path in sorted(shares, key=lambda one: -one[0])[: method.rank * len(targets)]]
        ranks = {path: min(taken.count(path), base.d_out) for path, base in targets.items()}
        if not self.adjust_alpha:
            return {path: {"rank": rank} for path, rank in ranks.items()}
        return {path: {"rank": rank, "alpha": method.alpha * rank / method.rank} for path, rank in ranks.items()}

    def factors(self, adapters: Mapping[str, PairAdapter], probe: Probe) -> Iterator[tuple[str, Factors]]:
        """Principal directions of each layer's inputs; the second factor stays zero."""
        from lora_lightning.adapters.starts import Factors

        for path, (directions, values) in self._directions(list(adapters), probe):
            A = directions[: adapters[path].rank]
            if self.whiten:
                A = A / values[: len(A), None].clamp_min(1e-12) ** 0.25  # singular values are roots of variances
            yield path, Factors(A, None)

    def _directions(self, paths: list[str], probe: Probe) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Directions (d_in, d_in) as rows, and variances (d_in,), largest first, of each layer."""
        from lora_lightning.adapters.starts import covariance_start

        for part in probe.in_parts(paths):
            for path, covariance in probe.covariances(part, centred=True).items():
                yield path, covariance_start(covariance, len(covariance))
