"""FollowPlateau: a smaller rate whenever a metric that the run logs has stopped getting better."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lora_lightning.callbacks.best import direction
from lora_lightning.callbacks.step_counting import JUDGES, StepCallback, logs_at
from lora_lightning.errors import NoEffectError, check
from lora_lightning.optim.warmup import WarmUp

_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
"""What torch's schedule has counted; the rest are settings."""


class FollowPlateau(StepCallback):
    """Steps torch's ReduceLROnPlateau after each validation, before a checkpoint is written.

    A metric that is no validation's is looked at as often as the trainer logs. Schedules of the run, such as a warm-up,
    go on from the smaller rate.

    Args:
        settings: with decay "plateau".

    Raises:
        NoEffectError: nobody logs the metric, or nothing was ever validated.
        SettingsError: neither name nor task say whether more of it is better.
    """

    phase: ClassVar[int] = JUDGES
    place = "model.lr_scheduler"

    def __init__(self, settings: WarmUp) -> None:
        super().__init__()
        self.settings, self.monitor, self.mode = settings, settings.monitor, settings.mode
        self._schedules: list[ReduceLROnPlateau] = []
        self._saved: list[dict[str, Any]] = []
        self._seen = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out which way is better."""
        super().setup(trainer, pl_module, stage)
        self.mode = self.settings.mode or direction(self.monitor, getattr(pl_module, "task", None))
        rule = f'"{self.monitor}" does not say whether more of it is better; set it to "max" or "min".'
        check(self.mode is not None, self.settings, "mode", rule)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take hold of the optimizers."""
        super().on_train_start(trainer, pl_module)
        options: Any = {"mode": self.mode, "factor": self.settings.factor, "patience": self.settings.patience}
        self._schedules = [ReduceLROnPlateau(optimizer, eps=0.0, **options) for optimizer in trainer.optimizers]
        for schedule, state in zip(self._schedules, self._saved, strict=False):
            schedule.load_state_dict(state)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Look at what training logs."""
        if not self.monitor.startswith("val_") and logs_at(trainer, step):
            self._look(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what validations log."""
        if self.monitor.startswith("val_") and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        found = trainer.callback_metrics
        if self.monitor not in found:
            raise NoEffectError(
                f'{self.place}.monitor is "{self.monitor}"; the run logs {", ".join(found) or "nothing"}.'
            )
        value = trainer.strategy.broadcast(float(found[self.monitor]))  # one decision for all processes
        self._seen += 1
        for schedule in self._schedules:
            before = [group["lr"] for group in schedule.optimizer.param_groups]
            schedule.step(value)
            after = [group["lr"] for group in schedule.optimizer.param_groups]
            if before == after:
                continue
            for config in trainer.lr_scheduler_configs:
                if config.scheduler.optimizer is schedule.optimizer:
                    rates = [self.settings.factor * rate for rate in config.scheduler.base_lrs]
                    config.scheduler.base_lrs = rates  # from which it computes, and which it saves
            if trainer.is_global_zero:
                print(f"rate: {before[0]:g} -> {after[0]:g} after step {trainer.global_step}, {self.monitor} {value:g}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that there was nothing to follow, after the last state has been written.

        Raises:
            NoEffectError: the metric was never logged.
        """
        if not self._seen and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise NoEffectError(
                f'{self.place}.decay is "plateau"; no {self.monitor} came in {trainer.global_step} steps, so the rate '
                "never followed it. Validate more often (trainer.val_check_interval), or take another decay."
            )

    def state_dict(self) -> dict[str, Any]:
        """What has been counted so far, for each optimizer."""
        counted = [{key: getattr(schedule, key) for key in _STATE} for schedule in self._schedules]
        return {"schedules": counted, "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._saved, self._seen = state_dict["schedules"], state_dict["seen"]
