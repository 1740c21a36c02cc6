"""AdaLoRA: adaptive budget allocation. Triplets of all layers compete for one budget, by smoothed sensitivity.

Zhang et al., 2023, arXiv:2303.10512, sections 3.1 to 3.3; the schedule is `RankBudget` of core.

    W' = W + s P diag(E) Q,   loss + gamma R(P, Q),   R = mean over P and Q of |Q Q^T - I|, |P^T P - I|

    paper     here             shape (out, in as nn.Linear stores it)
    W         weight           (d_out, d_in)   frozen
    Q, P      lora_A, lora_B   (rank, d_in), (d_out, rank)   start at N(0, 0.02^2)
    Lambda    gate             (rank,)         starts at 0; called E in the released code
    s         scaling          alpha / (rank + 1e-5), as in the released code and in peft
    gamma     orthogonality
    b(t)      budget           fraction of all rank components

Departs from the paper: R is the mean of Frobenius norms, as in the released code and peft; the paper squares them
(`penalty`). Weights are scored after the step and gradients before it, as there; the paper's algorithm takes both
before (`scored`). Gradients are read before clipping. Of equal scores the first are kept, where those codes drop all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import Adapters, LowRankFields, Method, check_low_rank

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from torch import Tensor

    from lora_lightning.adapters.base import GroupSpec
    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.weighted import WeightedAdapter

SCHEDULE = ("budget", "start", "end", "every_n_steps", "beta1", "beta2", "scored")
"""Fields of the schedule that allocates the budget."""


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LowRankFields, Method):
    """Low-rank update whose rank components are kept where their sensitivity is largest (Zhang et al., 2023).

    Rank is what each layer starts with. The authors start with 1.5 times what they end with, and take alpha 16 or 32.
    """

    paper: ClassVar[str] = "2303.10512"
    bibtex: ClassVar[str] = """@inproceedings{zhang2023adalora,
  title = {Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning},
  author = {Zhang, Qingru and Chen, Minshuo and Bukharin, Alexander and He, Pengcheng and Cheng, Yu
            and Chen, Weizhu and Zhao, Tuo},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  note = {arXiv:2303.10512}
}"""
    export: ClassVar[str] = "exact LoRA"
    peft_type: ClassVar[str] = "ADALORA"
    run_wide: ClassVar[tuple[str, ...]] = (*SCHEDULE, "orthogonality", "penalty_norm")

    budget: float = 2 / 3
    """Fraction of the rank components of all layers together that is left at the end, in (0, 1]; 1 removes none. A
    layer may keep all of its own, or none. peft's init_r 12 and target_r 8 are 2/3."""
    start: float = 0.1
    """When the budget starts to shrink: up to 1 a fraction of the run's optimizer steps, from 2 on a step number."""
    end: float = 0.5
    """When it has shrunk, in the same unit; the rest of the run trains what is left. The authors' MNLI run: 0.42."""
    every_n_steps: int = 10
    """Steps between two choices; in between a component that was left out may grow again. The authors take 100."""
    beta1: float = 0.85
    """Memory of the averaged sensitivity, in [0, 1)."""
    beta2: float = 0.85
    """Memory of the averaged distance from that average, in [0, 1)."""
    scored: Literal["after_step", "before_step"] = "after_step"
    """Weights in the sensitivity |w dL/dw|: those after the optimizer's step, as in the released code, or before it."""
    orthogonality: float = 0.1
    """Weight gamma of the penalty that keeps factors orthogonal; the authors take 0.1 to 0.5. 0 for none."""
    penalty_norm: Literal["norm", "squared"] = "norm"
    """Frobenius norms in that penalty as in the released code, or their squares as in the paper."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        kept = "it must lie in (0, 1]. Fraction of the rank components that is left; 0.67 is usual."
        check(0 < self.budget <= 1, self, "budget", kept)
        check(self.every_n_steps >= 1, self, "every_n_steps", "it must be at least 1.")
        for name in ("beta1", "beta2"):
            memory = "it must lie in [0, 1). Memory of an average; 0.85 is usual."
            check(0 <= getattr(self, name) < 1, self, name, memory)
        check(self.start >= 0, self, "start", "it must be at least 0, a fraction of the run, or a step from 2 on.")
        comparable = (self.start > 1) == (self.end > 1)
        rule = f"it must come after start, which is {self.start}."
        check(not comparable or self.start < self.end, self, "end", rule)
        check(self.orthogonality >= 0, self, "orthogonality", "it must be at least 0, for none; 0.1 is usual.")

    @property
    def scaling(self) -> float:
        """Factor s on the product."""
        return self.alpha / (self.rank + 1e-5)

    def build(self, base: BaseLayer) -> WeightedAdapter:
        """One pair of factors with a weight for each rank component."""
        from ll_adalora.functional import TRIPLETS
        from lora_lightning.adapters.weighted import WeightedAdapter

        return WeightedAdapter(base, rank=self.rank, scaling=self.scaling, dropout=self.dropout, components=TRIPLETS)

    def param_groups(self, adapters: Adapters) -> dict[str, GroupSpec]:
        """Groups "A", "B" and "gate"."""
        from lora_lightning.adapters.weighted import weighted_groups

        return weighted_groups(adapters, gate_decay=None)

    def penalty(self, adapters: Adapters) -> Tensor | None:
        """How far the factors are from orthogonal ones, weighted."""
        from ll_adalora.functional import distance_from_orthogonal

        if not self.orthogonality:
            return None
        return self.orthogonality * distance_from_orthogonal(adapters, self.penalty_norm == "squared")

    def callbacks(self) -> Sequence[Callback]:
        """The schedule that allocates the budget."""
        from lora_lightning.callbacks.rank_budget import RankBudget

        return [RankBudget(**{name: getattr(self, name) for name in SCHEDULE})]

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """Rank components that are left."""
        from lora_lightning.adapters.weighted import kept_ranks

        return kept_ranks(adapters)
