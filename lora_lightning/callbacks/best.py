"""KeepBest: what is written at the end is the state of the best validation instead of the last."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lora_lightning.callbacks.schedule import JUDGES, ScheduleCallback, order_callbacks
from lora_lightning.checkpoint import adapter_keys
from lora_lightning.errors import NoEffectError, check
from lora_lightning.injection import injected_root


class KeepBest(Callback):
    """Puts the adapter and trained heads of the best validation back when training ends.

    Only validations count by which every schedule has finished, since before that the adapter is not what its settings
    promise (a sparsity, a rank). Works in any Lightning project.

    Args:
        monitor: validation metric, as it was logged; None takes that of AdapterModule's task.
        mode: whether more of it is better.

    Raises:
        NoEffectError: no validation came after the schedules, or none logged the metric.
    """

    phase: ClassVar[int] = JUDGES

    def __init__(self, monitor: str | None = None, mode: Literal["max", "min"] = "max") -> None:
        self.monitor, self.mode = monitor, mode
        check(mode in ("max", "min"), self, "mode", 'it must be "max" or "min".')
        self.step: int | None = None
        self.values: dict[str, float] = {}
        self._tensors: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Act before anything is written."""
        order_callbacks(trainer)
        task = getattr(pl_module, "task", None)
        if self.monitor is None and task is not None:
            self.monitor, self.mode = f"val_{task.metric}", "max" if task.higher_is_better else "min"
        check(self.monitor is not None, self, "monitor", "name the metric that the module logs in validation.")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep a copy if this is the best so far."""
        name = str(self.monitor)
        schedules = [c for c in trainer.callbacks if isinstance(c, ScheduleCallback)]  # type: ignore[attr-defined]
        if trainer.sanity_checking or not all(schedule.finished(trainer.global_step) for schedule in schedules):
            return
        found = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val")}
        if name not in found:
            raise NoEffectError(f'KeepBest.monitor is "{name}"; validation logged {", ".join(found) or "nothing"}.')
        sign = 1 if self.mode == "max" else -1
        if self.step is None or sign * found[name] > sign * self.values[name]:
            self.step, self.values = trainer.global_step, found
            state = injected_root(pl_module).state_dict()
            self._tensors = {key: state[key].detach().clone() for key in adapter_keys(injected_root(pl_module))}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best state back."""
        if self.step is None:
            raise NoEffectError("KeepBest: no validation came after every schedule had finished; validate more often.")
        state = injected_root(pl_module).state_dict()
        for key, value in self._tensors.items():
            state[key].copy_(value)
        if trainer.is_global_zero:
            print(f"kept: the state of step {self.step}, {self.monitor} {self.values[str(self.monitor)]:.4f}")

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"step": self.step, "values": self.values, "tensors": self._tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run compares with what came before."""
        self.step, self.values, self._tensors = state_dict["step"], state_dict["values"], state_dict["tensors"]
