"""XGBLoRA: extreme gradient boosting LoRA.

Zhang et al., 2024, arXiv:2410.19694.

    for t = 1..T:   S_t a random set of L_s layers;   A_l ~ init, B_l = 0 of rank 1 for l in S_t
                    kappa steps on the pairs of S_t
                    W_l <- W_l + alpha_t B_l A_l   for l in S_t

    paper      here                                   meaning
    L_s        active_layers                          layers of a round; 11 was best for LLaMA3-8B
    kappa      stage_steps                            steps of a round
    alpha_t    blend * blend_decay^t                  step size, over the scaling of the inner method; 1 in the paper
    Omega      factor_decay / 2 (|A|^2 + |B|^2)       regulariser of a round

Departs from the paper: form and strength of the regulariser, kappa and the schedule of the rate could not be settled,
so that factor_decay is 0 and all are settings. Rank 1 is the inner method's to give (`inner: LoRA(rank=1)`). Pairs lie
on all layers; those that are not drawn stay at zero and get no gradient, which costs their share of the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_lightning.errors import check
from lora_lightning.methods import Adapters
from lora_lightning.stages import StagedMethod, check_staged

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class XGBLoRA(StagedMethod):
    """Rounds of boosting: rank-1 updates of a random set of layers, merged before the next (Zhang et al., 2024)."""

    paper: ClassVar[str] = "2410.19694"
    bibtex: ClassVar[str] = """@article{zhang2024xgblora,
  title = {Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning of {LLM}s},
  author = {Zhang, Yifei and Zhu, Hao and Liu, Aiwei and Yu, Han and Koniusz, Piotr and King, Irwin},
  journal = {arXiv preprint arXiv:2410.19694},
  year = {2024}
}"""
    run_wide: ClassVar[tuple[str, ...]] = (*StagedMethod.run_wide, "factor_decay")

    active_layers: int | None = 11
    """Layers that train in a round, drawn at random for each; null for all."""
    factor_decay: float = 0.0
    """Weight of the squared norms of the factors that train in the loss; 0 for none."""

    def __post_init__(self) -> None:
        check_staged(self)
        check(self.factor_decay >= 0, self, "factor_decay", "it must be at least 0. 0.01 is a common weight decay.")

    def penalty(self, adapters: Adapters) -> Tensor | None:
        """The inner method's, and the squared norms of the factors that train."""
        found = self.inner.penalty(adapters)
        if not self.factor_decay:
            return found
        pairs = [pair for adapter in adapters.values() if not adapter.resting for pair in adapter.factor_pairs()]
        squares = [factor.square().sum() for pair in pairs for factor in (pair.lora_A, pair.lora_B)]
        own = self.factor_decay / 2 * sum(squares[1:], squares[0])
        return own if found is None else found + own
