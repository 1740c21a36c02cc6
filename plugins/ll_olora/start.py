"""OLoRA: an orthonormal start of the factors from a QR decomposition of the weight.

Buyukakyuz, 2024, arXiv:2406.01775.

    W = Q R,   B0 = Q[:, :r],   A0 = R[:r, :]
    y = W x + (s B A x - s B0 A0 x)

    paper   here    meaning
    Q_r     B0      (d_out, r), orthonormal columns
    R_r     A0      (r, d_in)
    s       scaling the paper's equation has s = 1; what is taken off has s, as in peft

Departs from the paper: W - s B0 A0 is never written, the start is taken off beside the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_lightning.start_values import Start

if TYPE_CHECKING:
    from torch import Tensor

    from lora_lightning.adapters.pair import PairAdapter
    from lora_lightning.adapters.starts import Factors


@dataclass(frozen=True, kw_only=True)
class OLoRA(Start):
    """The factors start at the first columns and rows of a QR decomposition of the weight (Buyukakyuz, 2024).

    The directions are those of the weight's first columns, not its strongest ones. The paper takes ranks 32 and 64.
    """

    paper: ClassVar[str] = "2406.01775"
    bibtex: ClassVar[str] = """@article{buyukakyuz2024olora,
  title = {{OLoRA}: Orthonormal Low-Rank Adaptation of Large Language Models},
  author = {B{\\"u}y{\\"u}kaky{\\"u}z, Kerim},
  journal = {arXiv preprint arXiv:2406.01775},
  year = {2024}
}"""

    def of_layer(self, path: str, weight: Tensor, adapter: PairAdapter) -> Factors:  # noqa: ARG002 - Start's signature
        """Q and R of the weight."""
        from lora_lightning.adapters.starts import orthonormal_start

        return orthonormal_start(weight, adapter.rank)
