"""The learning-rate schedule: a linear warm-up, then linear, cosine, no decay, or one by a metric that is watched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lora_lightning.errors import check


@dataclass(frozen=True)
class StageEnds:
    """Where the stages of a run end, for a schedule that follows them."""

    length: int
    """Optimizer steps of a stage."""
    rate: Literal["rewarm", "restart", "jagged"]
    """A short rise from a tenth of the rate after each stage's end, the whole schedule anew in each stage, or a line
    from zero to where the run's own schedule is after it."""
    rewarm_steps: int
    """Steps of that rise."""
    floor: float = 0.0
    """For "jagged": what the run's own schedule decays to, as a fraction of the rate."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Factor on the base learning rate over a run."""

    former_fields: ClassVar[Mapping[str, str]] = {"share": "warmup_fraction"}

    warmup_fraction: float = 0.06
    """Fraction of all optimizer steps over which the rate rises from near zero; 0 for none."""
    decay: Literal["linear", "cosine", "constant", "plateau"] = "linear"
    """What follows: down to zero in a line or a half cosine, no decay, or a smaller rate whenever `monitor` has stopped
    getting better (torch's ReduceLROnPlateau, after each validation)."""
    monitor: str = "val_loss"
    """For decay "plateau": what the run logs and the rate follows. What is no validation metric counts once a log."""
    mode: Literal["max", "min"] | None = None
    """For decay "plateau": whether more of it is better; null takes what its name or the task says."""
    factor: float = 0.5
    """For decay "plateau": what the rate is multiplied with."""
    patience: int = 3
    """For decay "plateau": validations without a better value that are put up with."""

    def __post_init__(self) -> None:
        rule = "it must lie in [0, 1). Fraction of all steps spent warming up."
        check(0 <= self.warmup_fraction < 1, self, "warmup_fraction", rule)
        check(0 < self.factor < 1, self, "factor", "it must lie between 0 and 1. The rate is multiplied with it.")
        check(self.patience >= 0, self, "patience", "it must be at least 0. Validations without a better value.")
        check(self.mode in ("max", "min", None), self, "mode", 'it must be "max" or "min", or null.')
        rule = f'decay is "{self.decay}", which watches nothing; set decay to "plateau", or leave it out.'
        for name in ("monitor", "mode", "factor", "patience"):
            is_default = getattr(self, name) == type(self).__dataclass_fields__[name].default
            check(is_default or self.decay == "plateau", self, name, rule)

    def schedule(self, optimizer: Optimizer, total_steps: int, stage_ends: StageEnds | None = None) -> LambdaLR:
        """The scheduler for a run of `total_steps` optimizer steps, to be stepped after each.

        Args:
            optimizer: whose rates are scheduled.
            total_steps: optimizer steps of the run.
            stage_ends: stages that the schedule follows.
        """
        if stage_ends is not None and stage_ends.rate == "jagged":
            warmup, length = round(self.warmup_fraction * total_steps), stage_ends.length
            rule = f"that is {warmup} of {total_steps} steps, and the first stage ends at {length}, so at most "
            check(warmup <= length, self, "warmup_fraction", f"{rule}{length / total_steps:.3g}.")
        rate = partial(
            staged_factor,
            total_steps=total_steps,
            warmup_fraction=self.warmup_fraction,
            decay=self.decay,
            stage_ends=stage_ends,
        )
        return LambdaLR(optimizer, rate)


def staged_factor(
    step: int, total_steps: int, warmup_fraction: float, decay: str, stage_ends: StageEnds | None
) -> float:
    """`factor` over the run, or as `stage_ends` say over its stages."""
    if stage_ends is not None and stage_ends.rate == "jagged":
        return jagged_factor(step, total_steps, round(warmup_fraction * total_steps), decay, stage_ends)
    if stage_ends is None or stage_ends.rate == "rewarm":
        over_run = factor(step, total_steps, round(warmup_fraction * total_steps), decay)
        if stage_ends is None or step < stage_ends.length:
            return over_run
        return over_run * min(1.0, 0.1 + 0.9 * (step % stage_ends.length) / stage_ends.rewarm_steps)
    begin = step - step % stage_ends.length
    length = max(1, min(stage_ends.length, total_steps - begin))
    return factor(step - begin, length, round(warmup_fraction * length), decay)


def jagged_factor(step: int, total_steps: int, warmup_steps: int, decay: str, stage_ends: StageEnds) -> float:
    """Factor of a schedule with restarts: lines from 0 to the one envelope of the run, first and after each stage.

    (s, w0) are `step` and `warmup_steps`, L and w those of the stages, e the decay from w0 on, raised to the floor:

        s / w0                                   for s < w0
        (s mod L) / w * e(s - s mod L + w)       for s >= L, s mod L < w
        e(s)                                     else
    """

    def envelope(at: int) -> float:
        floor = stage_ends.floor
        return floor + (1 - floor) * factor(max(at, warmup_steps), total_steps, warmup_steps, decay)

    inside = step % stage_ends.length
    if step < warmup_steps:
        return step / warmup_steps
    if step >= stage_ends.length and inside < stage_ends.rewarm_steps:
        return inside / stage_ends.rewarm_steps * envelope(step - inside + stage_ends.rewarm_steps)
    return envelope(step)


def factor(step: int, total_steps: int, warmup_steps: int, decay: str) -> float:
    """Factor on the base rate for the step after `step` completed ones; never zero before the last step is done."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if decay in ("constant", "plateau"):
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, 1 - done) if decay == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
