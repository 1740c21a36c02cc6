"""LoRASC: low-rank adaptation with slow cascaded learning.

Li et al., 2024, arXiv:2407.01491. The noise is that of NoisyTune: Wu et al., 2022, arXiv:2202.12024.

For stages t = 1..T on a frozen W0:

    W~_t = W_t-1 + N_t,   N_t = lambda std(W_t-1) U[-1/2, 1/2]          the noise of the stage
    F_t  = merged(W~_t) - W~_t                                          the fast update, s B A for LoRA
    S_t  = (1 - alpha) S_t-1 + alpha F_t   or   alpha F_t               the slow one
    W_t  = W_t-1 + S_t

    paper     here                      meaning
    alpha     blend                     pace: weight of the newest update
    lambda    noise                     strength of the noise
    T         total / stage             stages of one epoch, or of stage_steps

Departs from the paper: no reference code was at hand. Which slow rule the paper runs, whether a stage's noise is taken
off again, whether its standard deviation is computed anew, and the learning rate over stages could not be settled;
each is an option here, with the default that the overview figure suggests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora_lightning.errors import SettingsError, check
from lora_lightning.methods import (
    Adapters,
    CascadeFields,
    Method,
    WrapperMethod,
    check_cascade,
    check_fields,
    field_names,
    values_of,
)

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback


@dataclass(frozen=True, kw_only=True)
class LoRASC(CascadeFields, WrapperMethod):
    """A chain of short trainings of another method, each folded into the weights before the next (Li et al., 2024)."""

    paper: ClassVar[str] = "2407.01491"
    bibtex: ClassVar[str] = """@inproceedings{li2024lorasc,
  title = {{LoRASC}: Expressive and Generalizable Low-rank Adaptation for Large Models via Slow Cascaded Learning},
  author = {Li, Siwei and Yang, Yifan and Shen, Yifei and Wei, Fangyun and Lu, Zongqing and Qiu, Lili and
            Yang, Yuqing},
  booktitle = {Empirical Methods in Natural Language Processing},
  year = {2024},
  note = {arXiv:2407.01491}
}"""
    export: ClassVar[str] = "exact LoRA"
    run_wide: ClassVar[tuple[str, ...]] = field_names(CascadeFields)

    blend: float = 0.5
    """Weight of the newest update in the blend, in (0, 1]; 1 with noise 0 is the plain cascade. Try 0.3 to 1."""
    rule: Literal["outer_step", "figure_ema"] = "figure_ema"
    """How updates become the slow one: a moving average which every stage adds, or the blend of each update once."""
    noise: float = 0.1
    """Noise on the frozen weights, relative to their standard deviation; 0 for none. Try 0 to 0.15."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_cascade(self)
        inner = type(self.inner).__name__
        check(isinstance(self.inner, Method), self, "inner", "it must be a method with its settings, such as LoRA().")
        check(not isinstance(self.inner, LoRASC), self, "inner", "stages inside stages would be folded twice.")
        if not self.inner.mergeable:
            raise SettingsError(
                f"LoRASC.inner is {inner}, whose update depends on the input, so that it cannot be folded into a "
                "weight; take a mergeable method, such as LoRA."
            )
        if not self.inner.starts_at_base:
            raise SettingsError(f"LoRASC.inner is {inner}, which does not start at zero, as each stage must.")

    def report(self, adapters: Adapters) -> dict[str, Any]:  # noqa: ARG002 - what is left of an adapter says nothing
        """Nothing: at the end of a stage the inner method's adapter is back at zero."""
        return {}

    def callbacks(self) -> Sequence[Callback]:
        """The cascade, and what the inner method needs."""
        from lora_lightning.callbacks.cascade import Cascade

        cascade = Cascade(**values_of(self, CascadeFields))
        return [*self.inner.callbacks(), cascade]
