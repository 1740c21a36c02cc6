"""The learning-rate schedule: a linear warm-up, then linear, cosine or no decay, counted in optimizer steps."""

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
    rate: Literal["rewarm", "restart"]
    """A short rise from a tenth of the rate after each stage's end, or the whole schedule anew in each stage."""
    rewarm_steps: int
    """Steps of that rise."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Factor on the base learning rate over a run."""

    former_fields: ClassVar[Mapping[str, str]] = {"share": "warmup_fraction"}

    warmup_fraction: float = 0.06
    """Fraction of all optimizer steps over which the rate rises from near zero; 0 for none."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """What follows: down to zero in a line or a half cosine, or no decay."""

    def __post_init__(self) -> None:
        rule = "it must lie in [0, 1). Fraction of all steps spent warming up."
        check(0 <= self.warmup_fraction < 1, self, "warmup_fraction", rule)

    def schedule(self, optimizer: Optimizer, total_steps: int, stage_ends: StageEnds | None = None) -> LambdaLR:
        """The scheduler for a run of `total_steps` optimizer steps, to be stepped after each.

        Args:
            optimizer: whose rates are scheduled.
            total_steps: optimizer steps of the run.
            stage_ends: stages that the schedule follows.
        """
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
    if stage_ends is None or stage_ends.rate == "rewarm":
        over_run = factor(step, total_steps, round(warmup_fraction * total_steps), decay)
        if stage_ends is None or step < stage_ends.length:
            return over_run
        return over_run * min(1.0, 0.1 + 0.9 * (step % stage_ends.length) / stage_ends.rewarm_steps)
    begin = step - step % stage_ends.length
    length = max(1, min(stage_ends.length, total_steps - begin))
    return factor(step - begin, length, round(warmup_fraction * length), decay)


def factor(step: int, total_steps: int, warmup_steps: int, decay: str) -> float:
    """Factor on the base rate for the step after `step` completed ones; never zero before the last step is done."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if decay == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, 1 - done) if decay == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
