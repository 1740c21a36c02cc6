"""LoRA-GA: a start by gradient approximation. The first step of the factors goes where full fine-tuning would go.

Wang et al., 2024, arXiv:2407.05000.

    G = mean dL/dW over some batches = U S V^T
    A0 = V^T[0:r],   B0 = U[:, r:2r]                    direction "ArB2r"
    A0, B0 <- d_out^(1/4) / gamma^(1/2) A0, B0          scale "stable", the authors' code
    y = W x + (s B A x - s B0 A0 x)

    paper   here        meaning
    gamma   gamma       16 in the authors' code
    eta     -           the paper's weight change by the offset is the start that is taken off

Departs from the paper: W is never written. Singular vectors are exact, where the authors' code draws a sketch of rank
4 r. Where a layer is narrower than 2 r, both sides take the leading vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import check_fields
from lora_lightning.start_values import Start

if TYPE_CHECKING:
    from lora_lightning.adapters.pair import PairAdapter
    from lora_lightning.adapters.starts import Factors
    from lora_lightning.injection.probe import Probe


@dataclass(frozen=True, kw_only=True)
class LoRAGA(Start):
    """The factors start at singular vectors of the loss's gradient by each weight (Wang et al., 2024)."""

    paper: ClassVar[str] = "2407.05000"
    bibtex: ClassVar[str] = """@inproceedings{wang2024loraga,
  title = {{LoRA-GA}: Low-Rank Adaptation with Gradient Approximation},
  author = {Wang, Shaowen and Yu, Linxi and Li, Jian},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  note = {arXiv:2407.05000}
}"""

    batches: int = 8
    """Training batches whose gradients are averaged."""
    direction: Literal["ArB2r", "A2rBr", "ArBr"] = "ArB2r"
    """Which vectors each side takes: A the first r and B the next ones, the other way round, or odd and even ones."""
    scale: Literal["stable", "peft", "unit"] = "stable"
    """Length of the start: both factors times d_out^(1/4) / gamma^(1/2); peft's, where B has that and the gradient's
    singular values, and A is orthonormal; or none."""
    gamma: float = 16.0
    """Larger values start smaller."""

    def __post_init__(self) -> None:
        check_fields(self)
        check(self.batches >= 1, self, "batches", "it must be at least 1; 8 is usual.")
        check(self.gamma > 0, self, "gamma", "it must be above 0; 16 is usual.")

    def probe_batches(self) -> int:
        """Those of `batches`."""
        return self.batches

    def factors(self, adapters: Mapping[str, PairAdapter], probe: Probe) -> Iterator[tuple[str, Factors]]:
        """Singular vectors of each layer's gradient."""
        from lora_lightning.adapters.starts import Factors, singular

        for part in probe.in_parts(list(adapters)):
            for path, gradient in probe.gradients(part).items():
                U, S, Vh = singular(gradient)
                a, b = self._taken(adapters[path].rank, S.shape[-1])
                A, B, length = Vh[..., a, :], U[..., :, b], gradient.shape[-2] ** 0.25 / self.gamma**0.5
                if self.scale == "stable":
                    A, B = length * A, length * B
                elif self.scale == "peft":
                    B = length * B * S[..., None, b]
                yield path, Factors(A, B)

    def _taken(self, rank: int, count: int) -> tuple[slice, slice]:
        """Which right and which left singular vectors start, of `count` of each."""
        if 2 * rank > count:
            return slice(0, rank), slice(0, rank)
        first, second = slice(0, rank), slice(rank, 2 * rank)
        if self.direction == "ArBr":
            return slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)
        return (first, second) if self.direction == "ArB2r" else (second, first)
