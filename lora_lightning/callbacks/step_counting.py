"""Optimizer steps for callbacks: StepCallback acts after each, phases order who acts, moments and ramps say when."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.errors import SettingsError
from lora_lightning.injection.records import injected_root, records
from lora_lightning.models.paths import plain

T = TypeVar("T")

MASKS = 3
"""Phase of callbacks that write values and masks."""
STAGE_ENDS = 5
"""Phase of callbacks that end a stage: what they fold has its masks."""
JUDGES = 7
"""Phase of callbacks that read the step's result: the guard, averages."""
REPORTS = 8
"""Phase of callbacks that write what a judged run has left."""


def order_callbacks(trainer: Trainer) -> None:
    """Give the trainer a new list, sorted by phase (0 where a callback has none), Checkpoint callbacks last."""
    ranked = sorted(trainer.callbacks, key=lambda c: (isinstance(c, Checkpoint), getattr(c, "phase", 0)))  # type: ignore[attr-defined]
    trainer.callbacks = ranked  # type: ignore[attr-defined]


class StepCallback(Callback, ABC):
    """Acts once after each optimizer step, however many batches a step takes.

    An attempt that a gradient scaler skipped counts as a step, as it does in Lightning's `global_step`.

    Attributes:
        phase: order among the callbacks of one step, low numbers first; those of one phase act in the order of the
            trainer's list, callbacks without a phase as phase 0, Checkpoint callbacks last of all. The phases of
            `lora_lightning.callbacks.step_counting`: `MASKS` (3) for what writes values and masks, `STAGE_ENDS` (5) for
            what ends a stage and folds what has its masks, `JUDGES` (7) for what reads the step's result, as the guard
            and averages do, `REPORTS` (8) for what writes down what a judged run has left.
        last_step: the optimizer step that was seen last; at the start of training the one that the run is at.
    """

    phase: ClassVar[int]

    def __init__(self) -> None:
        self.last_step = 0

    @abstractmethod
    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Act after optimizer step `step`, before any Checkpoint callback saves."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place in the step that `phase` declares."""
        order_callbacks(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step that the run is at."""
        self.last_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Act where the batch has ended a step."""
        if trainer.global_step == self.last_step:
            return
        self.last_step = trainer.global_step
        self.after_step(trainer, pl_module, self.last_step)


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole fit; None where nothing bounds them.

    Only max_steps bounds those of a module that steps its optimizers itself: an epoch may have any number.
    """
    if not trainer.lightning_module.automatic_optimization:
        return trainer.max_steps if trainer.max_steps > 0 else None
    total = trainer.estimated_stepping_batches
    return int(total) if math.isfinite(total) and total > 0 else None


def total_passes(trainer: Trainer) -> int | None:
    """Passes over the training data that the fit begins; None where nothing bounds them or their length is unknown."""
    bounds = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        bounds.append(trainer.max_epochs)
    batches, steps = trainer.num_training_batches, total_steps(trainer)
    if math.isfinite(batches) and batches > 0 and steps is not None:
        bounds.append(math.ceil(steps / math.ceil(batches / trainer.accumulate_grad_batches)))
    return min(bounds, default=None)


def logs_at(trainer: Trainer, step: int) -> bool:
    """Whether the trainer logs training numbers after optimizer step `step`; with `log_every_n_steps` 0 never."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0


def inside_window(trainer: Trainer) -> bool:
    """Whether a strategy that accumulates gradients itself, and is called for each batch, will not step with this."""
    return trainer.strategy.handles_gradient_accumulation and trainer.fit_loop.epoch_loop._should_accumulate()


def announce(trainer: Trainer, callback: Callback, verb: str, what: str, names: Sequence[str]) -> None:
    """Print what a callback acts on: how many, and the first name."""
    if trainer.is_global_zero:
        first = f"{plain(names[0])}{', ...' if len(names) > 1 else ''}"
        print(f"{type(callback).__name__}: {verb} {len(names)} {what}{'s' * (len(names) > 1)} ({first})")


def outside_step(trainer: Trainer, run: Callable[[], T]) -> T:
    """What `run` returns, which calls the model between steps; some strategies have to gather its weights for it."""
    inside = getattr(trainer.strategy, "inside", None)
    return run() if inside is None else inside(run)


def adapted_layer(module: nn.Module, path: str) -> tuple[AdaptedLayer, str, int]:
    """The layer under an adapter's path, the adapter's name, and the seed of its start values."""
    layer_path, _, name = path.rpartition(".adapters.")
    return cast(AdaptedLayer, module.get_submodule(layer_path)), name, records(injected_root(module))[name].seed


def adapted_layers(module: nn.Module, paths: Iterable[str]) -> dict[str, tuple[AdaptedLayer, str, int]]:
    """`adapted_layer` of many paths; the model is searched once."""
    seeds = {name: record.seed for name, record in records(injected_root(module)).items()}
    found = {}
    for path in paths:
        layer_path, _, name = path.rpartition(".adapters.")
        found[path] = cast(AdaptedLayer, module.get_submodule(layer_path)), name, seeds[name]
    return found


def injected_path(module: nn.Module, path: str) -> str:
    """The layer path that `inject` knew an adapter's layer by, from the adapter's path in the whole module."""
    root = injected_root(module)
    inside = next(name for name, part in module.named_modules() if part is root)
    return path.rpartition(".adapters.")[0].removeprefix(f"{inside}." if inside else "")


_verdicts: WeakKeyDictionary[Trainer, tuple[int, bool]] = WeakKeyDictionary()


def gradients_finite(trainer: Trainer, module: LightningModule) -> bool:
    """Whether the gradients of the coming step are finite on every process; computed once a step."""
    known = _verdicts.get(trainer)
    if known is None or known[0] != trainer.global_step:
        grads = [p.grad for p in module.parameters() if p.requires_grad and p.grad is not None]
        finite = not grads or bool(torch.isfinite(torch.nn.utils.get_total_norm(grads)))
        known = (trainer.global_step, trainer.strategy.reduce_boolean_decision(finite, all=True))
        _verdicts[trainer] = known
    return known[1]


def resolve_step(value: float, total: int | None, what: str) -> int:
    """A schedule's moment as a step number: up to 1 a fraction of all steps, from 2 on the number itself.

    Raises:
        SettingsError: a broken number above 1, or a fraction of a run whose length nothing bounds.
    """
    if value > 1:
        if value != int(value):
            raise SettingsError(
                f"{what} is {value}; above 1 it is a step number and must be whole, such as {round(value)}."
            )
        return int(value)
    if total is None:
        raise SettingsError(
            f"{what} is {value}, a fraction of all steps, but nothing bounds their number; set max_steps."
        )
    return round(value * total)


def resolve_ramp(start: float, end: float, total: int | None, what: str, clock: str = "steps") -> tuple[int, int]:
    """First and last step of a ramp; it never starts before step 2, since nothing is known at step 1.

    Args:
        start: moment before which nothing happens.
        end: moment from which on nothing changes.
        total: optimizer steps of the run, or what the schedule counts in their place.
        what: name of the schedule, for errors.
        clock: what is counted, in the plural, for errors.

    Raises:
        SettingsError: the ramp ends before it starts, or does not fit the run; names the smallest run that does.
    """
    unit = {"steps": "step", "passes": "pass"}[clock]
    first, last = max(2, resolve_step(start, total, f"{what}.start")), resolve_step(end, total, f"{what}.end")
    if total is not None and last > total:
        raise SettingsError(f"{what}.end is {unit} {last}; the run has {total} {clock}, so it must be at most {total}.")
    if first < last:
        return first, last
    if start >= end and (start > 1) == (end > 1):
        raise SettingsError(f"{what}.start is {start} and end is {end}; the schedule must start before it ends.")
    fits = next((n for n in range(1, 10_000) if max(2, _at(start, n)) < min(_at(end, n), n)), None)
    hint = f"; the smallest run that fits has {fits} {'optimizer steps' if clock == 'steps' else clock}" if fits else ""
    raise SettingsError(
        f"{what} would go from {unit} {first} to {unit} {last} in a run of {total} {clock}, so it does not fit{hint}."
    )


def _at(value: float, total: int) -> int:
    return int(value) if value > 1 else round(value * total)
