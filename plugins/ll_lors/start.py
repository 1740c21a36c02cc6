"""LoRSGradient: A starts at the directions in which the loss's gradient is largest, B at zero.

Hu et al., 2025, arXiv:2501.08582.

    G = mean dL/dW over some batches = U S V^T
    A0 = V^T[0:r] / gamma,   B0 = 0          of an embedding A0 = 0, B0 = U[:, 0:r] / gamma

Unlike LoRA-GA's start this one changes nothing, so that nothing is taken off. Departs from the authors' code: singular
vectors are exact, where it draws a sketch of rank 4 r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_lightning.errors import check
from lora_lightning.methods import check_fields
from lora_lightning.start_values import Start

if TYPE_CHECKING:
    from lora_lightning.adapters.pair import PairAdapter
    from lora_lightning.adapters.starts import Factors
    from lora_lightning.injection.probe import Probe


@dataclass(frozen=True, kw_only=True)
class LoRSGradient(Start):
    """A starts at leading right singular vectors of the loss's gradient by each weight, B at zero (Hu et al., 2025)."""

    paper: ClassVar[str] = "2501.08582"
    bibtex: ClassVar[str] = """@article{hu2025lors,
  title = {{LoRS}: Efficient Low-Rank Adaptation for Sparse Large Language Model},
  author = {Hu, Yuxuan and Zhang, Jing and Chen, Xiaodong and Zhao, Zhe and Li, Cuiping and Chen, Hong},
  journal = {arXiv preprint arXiv:2501.08582},
  year = {2025}
}"""
    subtracts: ClassVar[bool] = False

    batches: int = 8
    """Training batches whose gradients are averaged."""
    gamma: float = 1.0
    """What A is divided by; larger values start smaller."""

    def __post_init__(self) -> None:
        check_fields(self)
        check(self.batches >= 1, self, "batches", "it must be at least 1; 8 is usual.")
        check(self.gamma > 0, self, "gamma", "it must be above 0; the authors take 1.")

    def probe_batches(self) -> int:
        """Those of `batches`."""
        return self.batches

    def factors(self, adapters: Mapping[str, PairAdapter], probe: Probe) -> Iterator[tuple[str, Factors]]:
        """Singular vectors of each layer's gradient."""
        from lora_lightning.adapters.starts import Factors, singular

        for part in probe.in_parts(list(adapters)):
            for path, gradient in probe.gradients(part).items():
                U, _, Vh = singular(gradient)
                rank = adapters[path].rank
                if adapters[path].zero_A:
                    yield path, Factors(None, U[..., :rank] / self.gamma)
                else:
                    yield path, Factors(Vh[..., :rank, :] / self.gamma, None)
