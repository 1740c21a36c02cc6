"""LoRS: low-rank adaptation of a sparse model, of which no zero is filled. The equations stand in `adapter.py`.

Hu et al., 2025, arXiv:2501.08582.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import Method, ScaledLowRankFields, check_low_rank

if TYPE_CHECKING:
    from ll_lors.adapter import LoRSAdapter
    from lora_lightning.adapters.layers.base import BaseLayer


@dataclass(frozen=True, kw_only=True)
class LoRS(ScaledLowRankFields, Method):
    """Low-rank update of a sparse model that leaves every zero of its weights zero (Hu et al., 2025).

    The weight that is used is formed again in backward, so that nothing of its size is kept.
    """

    paper: ClassVar[str] = "2501.08582"
    bibtex: ClassVar[str] = """@article{hu2025lors,
  title = {{LoRS}: Efficient Low-Rank Adaptation for Sparse Large Language Model},
  author = {Hu, Yuxuan and Zhang, Jing and Chen, Xiaodong and Zhao, Zhe and Li, Cuiping and Chen, Hong},
  journal = {arXiv preprint arXiv:2501.08582},
  year = {2025}
}"""

    rank: int = 16
    """Inner width r of the update before it is masked."""
    alpha: float = 16.0
    """Numerator of the scaling; the authors take the rank itself."""
    scaling_rule: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/sqrt(r)"
    """How the scaling follows the rank; alpha / sqrt(r) in the authors' code."""
    gradient: Literal["exact", "unmasked"] = "exact"
    """"unmasked" is the authors': gradients of the factors as if there were no zeros, which are cheaper, since no
    matrix of the weight's size is formed for them. They are not those of the loss where the model has zeros."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        rule = "it must be 0: the update is added to the weight, so that no input of its own could be dropped."
        check(self.dropout == 0, self, "dropout", rule)

    def build(self, base: BaseLayer) -> LoRSAdapter:
        """The pair, masked by the zeros of the weight."""
        from ll_lors.adapter import LoRSAdapter

        return LoRSAdapter(base, self.rank, scaling=self.scaling, gradient=self.gradient)
