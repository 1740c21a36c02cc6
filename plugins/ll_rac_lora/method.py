"""RAC-LoRA: randomized asymmetric chain of LoRA.

Malinovsky et al., 2024, arXiv:2410.08305; code: github.com/hammoudhasan/RACLora.

    each block:   B ~ D frozen, A = 0 trains   (left sketch, frozen: B)   or   A ~ D frozen, B = 0 trains   (frozen: A)
                  W <- W + s B A

One gradient step of rate eta on A from zero gives W - eta s^2 B B^T grad f(W): a step in a random subspace, whose
projection is E[H] = r / d I for isotropic draws.

    paper           here         shape
    B_S, A_S        the buffer   (d_out, r), (r, d_in)   drawn from seed, stage and path: the same on all ranks
    A_hat, B_hat    the other    starts at zero, trains

Departs from the paper: it does not say what becomes of the optimizer's moments; they are forgotten, since the subspace
is another one (the authors' code keeps them: `moments: keep`). s is alpha / rank, where that code multiplies by alpha;
give rank times their alpha for it. D is the inner method's start of a random factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lora_lightning.errors import SettingsError
from lora_lightning.stages import StagedMethod

if TYPE_CHECKING:
    from lora_lightning.adapters.base import Adapter
    from lora_lightning.adapters.layers.base import BaseLayer


@dataclass(frozen=True, kw_only=True)
class RACLoRA(StagedMethod):
    """A chain of updates of which one factor is drawn at random for each stage and frozen (Malinovsky et al., 2024)."""

    paper: ClassVar[str] = "2410.08305"
    bibtex: ClassVar[str] = """@article{malinovsky2024raclora,
  title = {Randomized Asymmetric Chain of {LoRA}: The First Meaningful Theoretical Framework for Low-Rank Adaptation},
  author = {Malinovsky, Grigory and Michieli, Umberto and Hammoud, Hasan Abed Al Kader and Ceritli, Taha and
            Elesedy, Hayder and Ozay, Mete and Richt{\'a}rik, Peter},
  journal = {arXiv preprint arXiv:2410.08305},
  year = {2024}
}"""
    run_wide: ClassVar[tuple[str, ...]] = (*StagedMethod.run_wide, "frozen")

    frozen: Literal["A", "B"] = "A"
    """Which factor is random and frozen; the other one trains from zero."""

    def build(self, base: BaseLayer) -> Adapter:
        """The inner method's adapter with one factor as a buffer."""
        from lora_lightning.adapters.pair import PairAdapter

        adapter = self.inner.build(base)
        if not isinstance(adapter, PairAdapter) or adapter.start_A is not None:
            name = type(self.inner).__name__
            raise SettingsError(f"RACLoRA.inner is {name}, which is no plain pair of factors; take one, such as LoRA.")
        adapter.freeze_side(self.frozen)
        return adapter
