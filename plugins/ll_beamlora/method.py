"""BeamLoRA: rank components as candidates of a beam. Weak ones are overwritten by copies of strong ones.

Gu et al., 2025, arXiv:2502.13604, section 4; assess, prune and expand are `RankRewrites` of core.

    y = W x + s B (w * (A x)),   W' = W + s B diag(w) A,   w = r softmax(g / tau)

    paper    here            shape (out, in as nn.Linear stores it)
    W        weight          (d_out, d_in)   frozen
    A, B     lora_A/B        (rank, d_in), (d_out, rank)   start at LoRA's values
    g        gate            (rank,)         starts at 0, where w = 1: LoRA
    s        scaling         alpha / rank
    tau      temperature
    T_r      stage_steps     optimizer steps between two rewrites
    1 - p    pruned_mass     of the weights; falls to 0 at `end`

Departs from the paper: at most half of a layer's components are rewritten at once, so that sources and targets are
apart. The released code departs from the paper in its details, which `details` offers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_lightning.errors import check
from lora_lightning.methods import Adapters, LowRankFields, Method, check_low_rank

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from lora_lightning.adapters.base import GroupSpec
    from lora_lightning.adapters.layers.base import BaseLayer
    from lora_lightning.adapters.weighted import WeightedAdapter


@dataclass(frozen=True, kw_only=True)
class BeamLoRA(LowRankFields, Method):
    """Low-rank update whose weak rank components become copies of strong ones while training (Gu et al., 2025).

    The rank stays as it is. The authors take rank 64, alpha 128 and rate 3e-4.
    """

    paper: ClassVar[str] = "2502.13604"
    bibtex: ClassVar[str] = """@inproceedings{gu2025beamlora,
  title = {{BeamLoRA}: Beam-Constraint Low-Rank Adaptation},
  author = {Gu, Naibin and Zhang, Zhenyu and Liu, Xiyu and Fu, Peng and Lin, Zheng and Wang, Shuohuan and Sun, Yu
            and Wu, Hua and Wang, Weiping and Wang, Haifeng},
  booktitle = {Annual Meeting of the Association for Computational Linguistics},
  year = {2025},
  note = {arXiv:2502.13604}
}"""
    export: ClassVar[str] = "exact LoRA"
    run_wide: ClassVar[tuple[str, ...]] = ("stage_steps", "pruned_mass", "end", "details")

    temperature: float = 0.05
    """Temperature tau of the weights; smaller ones tell components apart sooner. The authors take 0.03 for rates below
    1e-4."""
    stage_steps: float = 0.08
    """Optimizer steps between two rewrites: up to 1 a fraction of the run's, from 2 on the number itself. Copies are of
    the middle of a stage. The authors take 3000 of about 37,000. A run needs two stages at least."""
    pruned_mass: float = 0.05
    """Largest fraction of all layers' weights that the pruned components hold, at the start; it falls along half a
    cosine. 0 rewrites nothing."""
    end: float = 0.67
    """When that is 0: up to 1 a fraction of the run's optimizer steps, from 2 on a step number."""
    details: Literal["paper", "released"] = "paper"
    """"paper" copies the factors' moments with them and clears those of rewritten gates. "released" is what the code
    does: factors keep their moments, all gates lose theirs, snapshots are a step later and the fraction is the step
    before's."""

    def __post_init__(self) -> None:
        check_low_rank(self)
        check(self.temperature > 0, self, "temperature", "it must be above 0; 0.05 is usual.")
        mass = "it must lie in [0, 1). Fraction of the weights; 0.05 is usual."
        check(0 <= self.pruned_mass < 1, self, "pruned_mass", mass)
        check(self.end > 0, self, "end", "it must be above 0, a fraction of the run, or a step from 2 on.")
        stage = "it must be above 0, a fraction of the run, or a number of steps from 2 on."
        check(self.stage_steps > 0, self, "stage_steps", stage)

    def build(self, base: BaseLayer) -> WeightedAdapter:
        """One pair of factors with a weight for each rank component."""
        from ll_beamlora.functional import in_a_beam
        from lora_lightning.adapters.weighted import WeightedAdapter

        beam = in_a_beam(self.temperature)
        return WeightedAdapter(base, rank=self.rank, scaling=self.scaling, dropout=self.dropout, components=beam)

    def param_groups(self, adapters: Adapters) -> dict[str, GroupSpec]:
        """Groups "A", "B" and "gate"."""
        from lora_lightning.adapters.weighted import weighted_groups

        return weighted_groups(adapters, gate_decay=None)

    def callbacks(self) -> Sequence[Callback]:
        """The schedule that rewrites."""
        from lora_lightning.callbacks.rank_rewrites import RankRewrites

        return [RankRewrites(self.stage_steps, self.pruned_mass, self.end, self.details)]

    def report(self, adapters: Adapters) -> dict[str, Any]:
        """Smallest and largest weight of each layer."""
        from ll_beamlora.functional import extremes

        return {"weights": extremes(adapters)}
