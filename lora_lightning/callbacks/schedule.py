"""The clock of all schedules: what acts once per optimizer step, at which moment, in which order.

An optimizer step has two moments:

    gradients   on_before_optimizer_step: complete, reduced over processes, unscaled, unclipped; weights not yet stepped
    stepped     on_train_batch_end, only when `global_step` has changed; before any Checkpoint callback saves

Steps are counted from 1 and include attempts that a gradient scaler skipped; after such an attempt nothing acts, and
what was gathered for it is forgotten (`on_skipped`).

Of several optimizers, which a module with manual optimization steps itself, a schedule follows those that hold
parameters of its adapters. Step numbers are Lightning's `global_step`, which counts the steps of all of them.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from lora_lightning.adapters.base import Adapter
from lora_lightning.callbacks.step_counting import StepCallback, announce, gradients_finite, total_steps
from lora_lightning.errors import NoEffectError, ResumeError
from lora_lightning.injection.records import trainable_adapters
from lora_lightning.methods import renamed


class ScheduleCallback(StepCallback):
    """Acts on adapters once per optimizer step, in any Lightning project.

    Attributes:
        phase: order among the callbacks of one step, low numbers first: `MASKS` (3) for what writes values and masks,
            `STAGE_ENDS` (5), `JUDGES` (7) for what reads the step's result, `REPORTS` (8), all of
            `lora_lightning.callbacks.step_counting`.
        last_step: the optimizer step that was seen last.
        requires: what an adapter must have, for the error when none does.
        reads_base: whether it reads or writes frozen weights between steps, which not every strategy allows.
        writes_values: whether it may write what trains between steps; DeepSpeed, which keeps copies, then refuses it.
        trainer: the run, from `on_start` on.
        module: its module.
        resumed: whether the run goes on from a checkpoint, known from `on_start` on.
        total: optimizer steps of the run, or None where nothing bounds it.
        changed_at_end: whether the end of training changed what the model computes, after the last validation.
        former_fields: settings by the name that they had before, as older checkpoints and configs spell them.
    """

    requires: ClassVar[str]
    reads_base: ClassVar[bool] = False
    writes_values: ClassVar[bool] = True
    changed_at_end: bool = False
    former_fields: ClassVar[Mapping[str, str]] = {}

    def __init__(self) -> None:
        super().__init__()
        # not at the class: the parser evaluates annotations of a class in the module of the subclass it is given
        self.trainer: Trainer
        self.module: LightningModule
        self._adapters: dict[str, Adapter] = {}
        self._finite = True
        self._stepped = False
        self.resumed = False
        self.total: int | None = None
        self._saved_total: int | None = None
        self._saved_settings: dict[str, Any] | None = None

    @abstractmethod
    def accepts(self, adapter: Adapter) -> bool:
        """Whether the schedule can act on an adapter."""

    def check_run(self, total: int | None, others: Sequence[Callback]) -> None:
        """Refuse a run of `total` steps beside `others`, where that needs no model; before training and by `doctor`.

        Raises:
            SettingsError: the schedule does not fit, or another callback stands against it.
        """

    def select(self, adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
        """The trainable adapters that the schedule accepts.

        Raises:
            NoEffectError: none does.
        """
        found = {path: adapter for path, adapter in adapters.items() if self.accepts(adapter)}
        if not found:
            raise NoEffectError(
                f"{type(self).__name__} found nothing to act on: it needs trainable adapters with {self.requires}; "
                f"the model has {len(adapters)} trainable adapters, none with any."
            )
        return found

    def on_start(self, total: int | None, adapters: Mapping[str, Adapter]) -> None:
        """Resolve the schedule against the run's `total` steps; called once, before the first step."""

    def on_gradients(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Read complete gradients and the weights that produced them."""

    @abstractmethod
    def on_stepped(self, step: int, adapters: Mapping[str, Adapter]) -> None:
        """Write values and masks after the step."""

    def on_skipped(self, step: int) -> None:
        """Forget what was gathered for a step that a gradient scaler has skipped."""

    def finished(self, step: int) -> bool:
        """Whether nothing more changes after `step`, so that the adapter is what its settings promise."""
        return True

    def metrics(self) -> Mapping[str, float]:
        """Numbers to log after a step, shown in the progress bar."""
        return {}

    def metric_names(self) -> Sequence[str]:
        """Names in `metrics`, as they are asked before a run; to be written out where `metrics` needs one."""
        return list(self.metrics())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the adapters and resolve the schedule.

        Raises:
            NoEffectError: the schedule accepts no trainable adapter.
            ResumeError: the run was started with another number of steps, or with other settings.
        """
        super().on_train_start(trainer, pl_module)
        self._adapters = self.select(trainable_adapters(pl_module))
        self.trainer, self.module, self.total = trainer, pl_module, total_steps(trainer)
        self.resumed = trainer.global_step > 0
        self._check_same()
        self._stepped = False
        self.check_run(self.total, [c for c in trainer.callbacks if c is not self])  # type: ignore[attr-defined]
        self.on_start(self.total, self._adapters)
        layers = [path.rpartition(".adapters.")[0] for path in self._adapters]
        announce(trainer, self, "acts on", "adapter", layers)

    def _check_same(self) -> None:
        """Compare the length of the run and the settings with those that it was started with."""
        if self._saved_total is not None and self._saved_total != self.total:
            raise ResumeError(
                f"{type(self).__name__}: the run was started for {self._saved_total} optimizer steps and would go on "
                f"for {self.total}; its schedule would jump. Resume with the same length."
            )
        if self._saved_settings is None:
            return
        usual = {name: each.default for name, each in inspect.signature(type(self)).parameters.items()}
        for name, value in self._settings().items():
            # one that the saved run did not have yet did what is usual now
            before = self._saved_settings.get(name, value if usual[name] is inspect.Parameter.empty else usual[name])
            if before != value:
                raise ResumeError(
                    f"{type(self).__name__}.{name} is {value!r}; the run was started with {before!r}. "
                    "Give the same value."
                )

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

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """The moment after the step, where an optimizer of these adapters took it."""
        if not self._stepped:
            return
        self._stepped = False
        if self._finite:
            with torch.no_grad():
                self.on_stepped(step, self._adapters)
        else:
            self.on_skipped(step)
        for name, value in self.metrics().items():
            pl_module.log(name, value, prog_bar=True)

    def _settings(self) -> dict[str, Any]:
        """Arguments of the constructor, as far as they are attributes and plain."""
        found = {}
        for name in inspect.signature(type(self)).parameters:
            value = getattr(self, name, ...)
            if isinstance(value, int | float | str | bool | list | None):
                found[name] = value
        return found

    def state_dict(self) -> dict[str, Any]:
        """The resolved length of the run, and the settings."""
        return {"total_steps": self.total, "settings": self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the length and the settings the run was started with."""
        self._saved_total = state_dict["total_steps"]
        self._saved_settings = renamed(state_dict["settings"], self.former_fields)
