"""PiSSA: principal singular values and singular vectors as the start of the factors.

Meng et al., 2024, arXiv:2404.02948, section 3.

    W = U S V^T,   s B0 A0 = U_r S_r V_r^T,   A0 = (S_r / s)^(1/2) V_r^T,   B0 = U_r (S_r / s)^(1/2)
    y = W x + (s B A x - s B0 A0 x)

    paper   here        meaning
    A, B    B, A        the paper names the factors of W = A B the other way round
    W_res   -           W - s B0 A0 is never written: the start is taken off beside the weight
    r       rank        singular triplets that train

Departs from the paper: the paper has no scaling s, which here changes neither the start's product nor W_res.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import check_fields
from lora_lightning.start_values import Start

if TYPE_CHECKING:
    from torch import Tensor

    from lora_lightning.adapters.pair import PairAdapter
    from lora_lightning.adapters.starts import Factors


@dataclass(frozen=True, kw_only=True)
class PiSSA(Start):
    """The factors start at the leading singular triplets of the weight, which train instead of it (Meng et al., 2024).

    The authors take alpha as large as the rank, so that s is 1.
    """

    paper: ClassVar[str] = "2404.02948"
    bibtex: ClassVar[str] = """@inproceedings{meng2024pissa,
  title = {{PiSSA}: Principal Singular Values and Singular Vectors Adaptation of Large Language Models},
  author = {Meng, Fanxu and Wang, Zhaohui and Zhang, Muhan},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  note = {arXiv:2404.02948}
}"""

    power_iterations: int | None = None
    """Null takes the exact decomposition; a number the randomised one with as many power iterations (4 to 16)."""
    part: Literal["leading", "trailing"] = "leading"
    """Which end of the spectrum trains."""

    def __post_init__(self) -> None:
        check_fields(self)
        number = self.power_iterations
        whole = number is None or (type(number) is int and number >= 0)
        check(whole, self, "power_iterations", "it must be a whole number, or null.")
        exact = number is None or self.part == "leading"
        check(exact, self, "power_iterations", 'the randomised decomposition finds part "leading" alone; leave it out.')

    def of_layer(self, path: str, weight: Tensor, adapter: PairAdapter) -> Factors:  # noqa: ARG002 - Start's signature
        """Singular triplets of the weight."""
        from lora_lightning.adapters.starts import randomised_weight_start, weight_start

        if self.power_iterations is None:
            return weight_start(weight, adapter.rank, adapter.scaling, self.part)
        return randomised_weight_start(weight, adapter.rank, adapter.scaling, self.power_iterations)
