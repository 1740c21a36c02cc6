"""The clock of all schedules: what acts once per optimizer step, at which moment, in which order.

An optimizer step has two moments:

    gradients   on_before_optimizer_step: complete, reduced over processes, unscaled, unclipped; weights not yet moved
    stepped     on_train_batch_end, only when `global_step` has changed; before any Checkpoint callback saves

Steps are counted from 1 and include attempts that a gradient scaler skipped; after such an attempt nothing acts.

Of several optimizers, which a module with manual optimization steps itself, a schedule follows those that hold
parameters of its adapters. Step numbers are Lightning's `global_step`, which counts the steps of all of them.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import nn
from torch.optim import Optimizer

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layer import AdaptedLayer
from lora_lightning.errors import NoEffectError, ResumeError, SettingsError
from lora_lightning.injection import injected_root, records, trainable_adapters
from lora_lightning.paths import plain

T = TypeVar("T")

MASKS = 3
"""Phase of callbacks that write values and masks."""
KNOTS = 5
"""Phase of callbacks that end a stage: what they fold has its masks."""
JUDGES = 7
"""Phase of callbacks that read the step's result: the guard, averages."""
REPORTS = 8
"""Phase of callbacks that write what a judged run has left."""


def order_callbacks(trainer: Trainer) -> None:
    """Give the trainer a new list, sorted by phase (0 where a callback has none), Checkpoint callbacks last."""
    ranked = sorted(trainer.callbacks, key=lambda c: (isinstance(c, Checkpoint), getattr(c, "phase", 0)))  # type: ignore[attr-defined]
    trainer.callbacks = ranked  # type: ignore[attr-defined]


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole fit; None where nothing bounds them.

    Only max_steps bounds those of a module that steps its optimizers itself: an epoch may have any number.
    """
    if not trainer.lightning_module.automatic_optimization:
        return trainer.max_steps if trainer.max_steps > 0 else None
    total = trainer.estimated_stepping_batches
    return int(total) if math.isfinite(total) and total > 0 else None


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
    """A schedule's moment as a step number: up to 1 a share of all steps, from 2 on the number itself.

    Raises:
        SettingsError: a fraction above 1, or a share of a run whose length nothing bounds.
    """
    if value > 1:
        if value != int(value):
            raise SettingsError(
                f"{what} is {value}; above 1 it is a step number and must be whole, such as {round(value)}."
            )
        return int(value)
    if total is None:
        raise SettingsError(f"{what} is {value}, a share of all steps, but nothing bounds their number; set max_steps.")
    return round(value * total)


def resolve_ramp(start: float, end: float, total: int | None, what: str) -> tuple[int, int]:
    """First and last step of a ramp; it never starts before step 2, since nothing is known at step 1.

    Args:
        start: moment before which nothing happens.
        end: moment from which on nothing changes.
        total: optimizer steps of the run.
        what: name of the schedule, for errors.

    Raises:
        SettingsError: the ramp ends before it starts, or does not fit the run; names the smallest run that does.
    """
    first, last = max(2, resolve_step(start, total, f"{what}.start")), resolve_step(end, total, f"{what}.end")
    if total is not None and last > total:
        raise SettingsError(f"{what}.end is step {last}; the run has {total} steps, so it must be at most {total}.")
    if first < last:
        return first, last
    if start >= end and (start > 1) == (end > 1):
        raise SettingsError(f"{what}.start is {start} and end is {end}; the schedule must start before it ends.")
    fits = next((n for n in range(1, 10_000) if max(2, _at(start, n)) < min(_at(end, n), n)), None)
    hint = f"; the smallest run that fits has {fits} optimizer steps" if fits else ""
    raise SettingsError(
        f"{what} would go from step {first} to step {last} in a run of {total} steps, so it does not fit{hint}."
    )


def _at(value: float, total: int) -> int:
    return int(value) if value > 1 else round(value * total)


class ScheduleCallback(Callback, ABC):
    """Acts on adapters once per optimizer step, in any Lightning project.

    Attributes:
        phase: order among schedules of one step.
        asks: the question an adapter must answer, for the error when none does.
        reads_base: whether it reads or writes frozen weights between steps, which not every strategy allows.
        writes_values: whether it may write what trains between steps; DeepSpeed, which keeps copies, then refuses it.
        trainer: the run, from `begin` on.
        module: its module.
        total: optimizer steps of the run, or None where nothing bounds it.
        changed_at_end: whether the end of training changed what the model computes, after the last validation.
    """

    phase: ClassVar[int]
    asks: ClassVar[str]
    reads_base: ClassVar[bool] = False
    writes_values: ClassVar[bool] = True
    trainer: Trainer
    module: LightningModule
    changed_at_end: bool = False

    def __init__(self) -> None:
        self._adapters: dict[str, Adapter] = {}
        self._seen = 0
        self._finite = True
        self._stepped = False
        self.total: int | None = None
        self._saved_total: int | None = None
        self._saved_settings: dict[str, Any] | None = None

    @abstractmethod
    def wants(self, adapter: Adapter) -> bool:
        """Whether an adapter answers the question."""

    def check_run(self, total: int | None, others: Sequence[Callback]) -> None:
        """Refuse a run of `total` steps beside `others`, where that needs no model; before training and by `doctor`.

        Raises:
            SettingsError: the schedule does not fit, or another callback stands against it.
        """

    def choose(self, adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
        """The trainable adapters that answer the question.

        Raises:
            NoEffectError: none does.
        """
        found = {path: adapter for path, adapter in adapters.items() if self.wants(adapter)}
        if not found:
            raise NoEffectError(
                f"{type(self).__name__} found nothing to act on: it needs trainable adapters with {self.asks}; "
                f"the model has {len(adapters)} trainable adapters, none with any."
            )
        return found

    def begin(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Resolve the schedule against the run's `total` steps; called once, before the first step."""

    def on_gradients(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Read complete gradients and the weights that produced them."""

    @abstractmethod
    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Write values and masks after the step."""

    def finished(self, step: int) -> bool:
        """Whether nothing more changes after `step`, so that the adapter is what its settings promise."""
        return True

    def metrics(self) -> Mapping[str, float]:
        """Numbers to log after a step, shown in the progress bar."""
        return {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place in the step that `phase` declares."""
        order_callbacks(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the adapters and resolve the schedule.

        Raises:
            NoEffectError: no trainable adapter answers the question.
            ResumeError: the run was started with another number of steps.
        """
        self._adapters = self.choose(trainable_adapters(pl_module))
        self.trainer, self.module, self.total = trainer, pl_module, total_steps(trainer)
        if self._saved_total is not None and self._saved_total != self.total:
            raise ResumeError(
                f"{type(self).__name__}: the run was started for {self._saved_total} optimizer steps and would go on "
                f"for {self.total}; its schedule would jump. Resume with the same length."
            )
        for name, value in self._settings().items() if self._saved_settings is not None else ():
            before = (self._saved_settings or {}).get(name, value)
            if before != value:
                raise ResumeError(
                    f"{type(self).__name__}.{name} is {value!r}; the run was started with {before!r}. "
                    "Give the same value."
                )
        self._seen, self._stepped = trainer.global_step, False
        self.check_run(self.total, [c for c in trainer.callbacks if c is not self])  # type: ignore[attr-defined]
        self.begin(self.total, self._adapters)
        layers = [path.rpartition(".adapters.")[0] for path in self._adapters]
        announce(trainer, self, "acts on", "adapter", layers)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The moment of complete gradients."""
        if len(trainer.optimizers) > 1 and not self._holds_any(optimizer):
            return
        self._stepped = True
        self._finite = gradients_finite(trainer, pl_module)
        if self._finite:
            self.on_gradients(trainer.global_step + 1, self._adapters)

    def _holds_any(self, optimizer: Optimizer) -> bool:
        own = {id(p) for adapter in self._adapters.values() for p in adapter.parameters()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """The moment after the step."""
        if trainer.global_step == self._seen or not self._stepped:
            return
        self._seen, self._stepped = trainer.global_step, False
        if self._finite:
            with torch.no_grad():
                self.on_stepped(self._seen, self._adapters)
        for name, value in self.metrics().items():
            pl_module.log(name, value, prog_bar=True)

    def _settings(self) -> dict[str, Any]:
        """Arguments of the constructor, as far as they are attributes and plain."""
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return {n: v for n in names if isinstance(v := getattr(self, n), int | float | str | bool | None)}

    def state_dict(self) -> dict[str, Any]:
        """The resolved length of the run, and the settings."""
        return {"total_steps": self.total, "settings": self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the length and the settings the run was started with."""
        self._saved_total, self._saved_settings = state_dict["total_steps"], state_dict["settings"]
