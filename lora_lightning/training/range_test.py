"""A learning rate from a short range test: Lightning's finder, before the first step of a run.

The rate rises from a thirtieth to thirty times a start over 60 optimizer steps. The loss, averaged over 5 of them, is
lowest where the rate has become too high for what is still to be learned; half of that rate is taken
(docs/optimizers.md has what the half was measured by). Everything that the test has trained is put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from torch.optim import Optimizer

from lora_lightning.optim.wrapper import OptimizerWrapper

STEPS = 60
REACH = 30.0
"""Highest rate of the test over its start, and the start over the lowest."""
WINDOW = 5
"""Steps whose losses are averaged."""
FRACTION = 0.5
"""Of the rate of the lowest loss."""
SMOOTHING = 0.98
"""Weight of the past in the losses that Lightning's finder gives."""


class RangeTest(Callback):
    """Sets the learning rate before a fit begins, and tells it.

    Lightning's own finder trains before the run's callbacks and checks can tell its steps from those of the run, and
    sets one rate for all groups of parameters. Here callbacks sit out the test, groups keep the ratios of their rates,
    and validation waits. A run that resumes keeps the rate that it has.

    Args:
        start: the rate that the run's optimizer is made with.
        tell: is given the rate that is found, on every process, before the first step.
    """

    def __init__(self, start: float, tell: Callable[[float], object] = lambda _: None) -> None:
        self.start, self.tell = start, tell

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the test, put back what it has trained, and set the rate."""
        if trainer.ckpt_path is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        finder = LearningRateFinder(
            self.start / REACH, self.start * REACH, STEPS, update_attr=False, early_stop_threshold=None
        )
        prepare: Callable[[], object] = getattr(pl_module, "prepare_losses", pl_module.train)
        prepare()
        with _alone(trainer), _ratios_kept(trainer.optimizers):
            finder.lr_find(trainer, pl_module)
        assert finder.optimal_lr is not None
        found = finder.optimal_lr.results
        rate = suggestion(found["lr"], unsmoothed(found["loss"])) or self.start
        scale_rates(trainer, rate / self.start)
        self.tell(rate)


def suggestion(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Half of the rate at which losses, averaged over a window, are lowest; None where too few are finite.

    Args:
        rates: rising.
        losses: one a rate.
    """
    finite = next((at for at, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    windows = range(max(0, min(finite, len(rates)) - WINDOW + 1))
    if not windows:
        return None
    lowest = min(windows, key=lambda at: sum(losses[at : at + WINDOW]))
    return float(f"{FRACTION * rates[lowest + WINDOW // 2]:.2g}")


def unsmoothed(losses: Sequence[float]) -> list[float]:
    """Losses as they were before Lightning's finder averaged each with those before it."""
    found, average = [], 0.0
    for step, loss in enumerate(losses, start=1):
        now = loss * (1 - SMOOTHING ** (step + 1))
        found.append((now - SMOOTHING * average) / (1 - SMOOTHING))
        average = now
    return found


def scale_rates(trainer: Trainer, factor: float) -> None:
    """Multiply every rate of the trainer's optimizers and schedules, as if they had been made with it."""
    for optimizer in trainer.optimizers:
        _scale(optimizer.defaults, factor)
        for group in optimizer.param_groups:
            _scale(group, factor)
        while isinstance(optimizer, OptimizerWrapper):
            optimizer = optimizer.inner
            _scale(optimizer.defaults, factor)
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
            scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _scale(options: dict[str, Any], factor: float) -> None:
    for name in ("lr", "initial_lr"):
        if name in options:
            options[name] = options[name] * factor


@contextmanager
def _alone(trainer: Trainer) -> Iterator[None]:
    """Callbacks away, and no validation."""
    loop: Any = trainer.fit_loop.epoch_loop
    callbacks, trainer.callbacks = trainer.callbacks, []  # type: ignore[attr-defined]
    loop._should_check_val_fx = lambda *_: False
    try:
        yield
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        del loop._should_check_val_fx


@contextmanager
def _ratios_kept(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Steps at each group's own ratio to the first, where the finder gives all groups one rate."""
    with ExitStack() as hooks:
        for optimizer in optimizers:
            full = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
            ratios = [rate / full[0] for rate in full]

            def up(optimizer: Optimizer, *_: Any, ratios: list[float] = ratios) -> None:
                for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                    group["lr"] *= ratio

            def down(optimizer: Optimizer, *_: Any, ratios: list[float] = ratios) -> None:
                for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                    group["lr"] /= ratio

            hooks.callback(optimizer.register_step_pre_hook(up).remove)
            hooks.callback(optimizer.register_step_post_hook(down).remove)
        yield
