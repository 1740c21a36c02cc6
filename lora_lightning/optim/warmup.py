"""The learning-rate schedule: a linear warm-up, then linear, cosine or no decay, counted in optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lora_lightning.errors import check


@dataclass(frozen=True)
class Knots:
    """Where stages of a run begin, for a schedule that follows them."""

    length: int
    """Optimizer steps of a stage."""
    rate: Literal["rewarm", "restart"]
    """A short rise from a tenth of the rate after each knot, or the whole schedule anew in each stage."""
    rewarm_steps: int
    """Steps of that rise."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Share of the base learning rate over a run."""

    share: float = 0.06
    """Share of all optimizer steps over which the rate rises from near zero; 0 for none."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """What follows: down to zero in a line or a half cosine, or no decay."""

    def __post_init__(self) -> None:
        check(0 <= self.share < 1, self, "share", "it must lie in [0, 1). Share of all steps spent warming up.")

    def schedule(self, optimizer: Optimizer, total_steps: int, knots: Knots | None = None) -> LambdaLR:
        """The scheduler for a run of `total_steps` optimizer steps, to be stepped after each.

        Args:
            optimizer: whose rates are scheduled.
            total_steps: optimizer steps of the run.
            knots: stages that the schedule follows.
        """
        return LambdaLR(
            optimizer, partial(staged_factor, total_steps=total_steps, share=self.share, decay=self.decay, knots=knots)
        )


def staged_factor(step: int, total_steps: int, share: float, decay: str, knots: Knots | None) -> float:
    """`factor` over the run, or as `knots` say over its stages."""
    if knots is None or knots.rate == "rewarm":
        whole = factor(step, total_steps, round(share * total_steps), decay)
        if knots is None or step < knots.length:
            return whole
        return whole * min(1.0, 0.1 + 0.9 * (step % knots.length) / knots.rewarm_steps)
    begin = step - step % knots.length
    length = max(1, min(knots.length, total_steps - begin))
    return factor(step - begin, length, round(share * length), decay)


def factor(step: int, total_steps: int, warmup_steps: int, decay: str) -> float:
    """Factor on the base rate for the step after `step` completed ones; never zero before the last step is done."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if decay == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, 1 - done) if decay == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
