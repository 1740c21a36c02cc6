"""SoRA: sparse low-rank adaptation. Gates of rank components train, and a proximal step closes them for good.

Ding et al., 2023, arXiv:2311.11696, section 3.

    y = W x + s B (g * (A x)),   W' = W + s B diag(g) A
    after each optimizer step:   g <- T_tau(g),   T_tau(v) = sign(v) max(|v| - tau, 0),   tau = eta_t lambda

    paper    here          shape (out, in as nn.Linear stores it)
    W        weight        (d_out, d_in)   frozen
    A, B     lora_A/B      (rank, d_in), (d_out, rank)   start at LoRA's values: B is zero
    g        gate          (rank,)         starts at N(0, 1)
    s        scaling       alpha / rank
    eta_t    rate of the group "gate" in that step
    lambda   shrinkage

Departs from the paper: one optimizer with a group of its own for the gates, instead of two optimizers. The released
code takes a constant tau, an operator that closes everything within two thresholds, and adds c mean|g| to the loss;
these are options.
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


@dataclass(frozen=True, kw_only=True)
class SoRA(LowRankFields, Method):
    """Low-rank update with a trained gate on each rank component, which sparse training closes (Ding et al., 2023).

    Rank is the largest that a layer may keep. The authors take rank 8, alpha 16 and rate 8e-4.
    """

    paper: ClassVar[str] = "2311.11696"
    bibtex: ClassVar[str] = """@inproceedings{ding2023sora,
  title = {Sparse Low-rank Adaptation of Pre-trained Language Models},
  author = {Ding, Ning and Lv, Xingtai and Wang, Qiaosen and Chen, Yulin and Zhou, Bowen and Liu, Zhiyuan
            and Sun, Maosong},
  booktitle = {Empirical Methods in Natural Language Processing},
  year = {2023},
  note = {arXiv:2311.11696}
}"""
    export: ClassVar[str] = "exact LoRA"
    run_wide: ClassVar[tuple[str, ...]] = (
        "shrinkage",
        "threshold",
        "operator",
        "stages",
        "first_shrinkage",
        "gate_penalty",
        "gate_lr_ratio",
    )

    shrinkage: float = 0.4
    """Strength lambda of the sparsity: a step takes the gates' rate times this off each gate; 0 closes none. The
    authors' constant threshold 3e-4 is 0.375 at their rate. Gates start near 1, so short runs need more."""
    threshold: Literal["rate", "constant"] = "rate"
    """"rate" follows the learning rate, as in the paper; "constant" takes `shrinkage` itself off at every step, as the
    released code does, where 3e-4 is usual."""
    operator: Literal["soft", "released"] = "soft"
    """"soft" is the paper's operator; the released code's closes all gates within two thresholds of zero."""
    stages: int = 1
    """Equal parts of the run, of rising strength, for a curve from dense to sparse; the authors take 7."""
    first_shrinkage: float = 0.0
    """Strength of the first of several stages; the last has `shrinkage`, those between lie on a line."""
    gate_penalty: float = 0.0
    """Weight of the mean |g| over all gates in the loss; 10 in a script of the authors, none in the paper."""
    gate_lr_ratio: float = 1.0
    """Learning rate of the gates over that of the factors."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        for name in ("shrinkage", "first_shrinkage", "gate_penalty"):
            check(getattr(self, name) >= 0, self, name, "it must be at least 0, which has no effect.")
        check(self.stages >= 1, self, "stages", "it must be at least 1, one strength for the whole run.")
        check(self.gate_lr_ratio > 0, self, "gate_lr_ratio", "it must be above 0; 1 trains gates as factors.")

    def build(self, base: BaseLayer) -> WeightedAdapter:
        """One pair of factors with a gate on each rank component."""
        from ll_sora.callback import GATED
        from lora_lightning.adapters.weighted import WeightedAdapter

        return WeightedAdapter(base, rank=self.rank, scaling=self.scaling, dropout=self.dropout, components=GATED)

    def param_groups(self, adapters: Adapters) -> dict[str, GroupSpec]:
        """Groups "A", "B" and "gate", of which the last has no weight decay."""
        from lora_lightning.adapters.weighted import weighted_groups

        return weighted_groups(adapters, self.gate_lr_ratio)

    def penalty(self, adapters: Adapters) -> Tensor | None:
        """The mean |g| over all gates, weighted."""
        from ll_sora.callback import mean_gate

        return self.gate_penalty * mean_gate(adapters) if self.gate_penalty else None

    def callbacks(self) -> Sequence[Callback]:
        """The proximal step."""
        from ll_sora.callback import ProximalStep

        return [ProximalStep(self.shrinkage, self.threshold, self.operator, self.stages, self.first_shrinkage)]

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """Rank components whose gate is open."""
        from lora_lightning.adapters.weighted import kept_ranks

        return kept_ranks(adapters)
