"""KeepBest: what is written at the end is the state of the best validation instead of the last."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.callbacks.step_counting import JUDGES, announce, order_callbacks
from lora_lightning.distributed import gather_nested, shard_like
from lora_lightning.errors import NoEffectError, check
from lora_lightning.injection.records import injected_root, records
from lora_lightning.storage.folded import make_room_for_folded, rewrite_weights
from lora_lightning.storage.state import adapter_keys

_LESS = ("loss", "error", "perplexity", "ppl", "mse", "mae", "rmse", "wer", "cer")
_MORE = ("accuracy", "acc", "f1", "auc", "auroc", "precision", "recall", "bleu", "chrf", "rouge", "match", "pearson",
         "spearman", "matthews", "mcc", "iou", "score")  # fmt: skip


def direction(metric: str, task: Any = None) -> Literal["max", "min"] | None:
    """Whether more or less of a metric is better: by the task, if it is its, else by its name; None if neither says.

    Args:
        metric: name as it is logged.
        task: of an AdapterModule, with `metric` and `higher_is_better`.

    Example:
        >>> direction("val_loss"), direction("val_exact_match"), direction("val_x")
        ('min', 'max', None)
    """
    if task is not None and metric == f"val_{task.metric}":
        return "max" if task.higher_is_better else "min"
    words = re.split(r"[^a-z0-9]+", metric.lower())
    return "min" if any(word in _LESS for word in words) else "max" if any(word in _MORE for word in words) else None


class KeepBest(Callback):
    """Puts the adapter and trained heads of the best validation back when training ends.

    Only validations count by which every schedule has finished, since before that the adapter is not what its settings
    promise (a sparsity, a rank). Works in any Lightning project.

    Args:
        monitor: validation metric, as it was logged; None takes that of AdapterModule's task.
        mode: whether more of it is better; None takes "min" for a loss, an error or a perplexity, and "max" for what is
            known to grow, such as an accuracy.

    Raises:
        NoEffectError: no adapter, no validation after the schedules, or none that logged the metric.
    """

    phase: ClassVar[int] = JUDGES

    def __init__(self, monitor: str | None = None, mode: Literal["max", "min"] | None = None) -> None:
        self.monitor, self.mode = monitor, mode
        check(mode in ("max", "min", None), self, "mode", 'it must be "max" or "min", or null.')
        self.step: int | None = None
        self.values: dict[str, float] = {}
        self._tensors: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Act before anything is written."""
        order_callbacks(trainer)
        task = getattr(pl_module, "task", None)
        if self.monitor is None and task is not None:
            self.monitor, self.mode = f"val_{task.metric}", None
        check(self.monitor is not None, self, "monitor", "name the metric that the module logs in validation.")
        self.mode = self.mode or direction(str(self.monitor), task)
        rule = f'"{self.monitor}" does not say whether more of it is better; set it to "max" or "min".'
        check(self.mode is not None, self, "mode", rule)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what will be kept."""
        if not any(records(module) for module in pl_module.modules()):
            raise NoEffectError("KeepBest found nothing to act on: it keeps adapters and trained heads; there is none.")
        announce(trainer, self, "keeps", "tensor", adapter_keys(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep a copy if this is the best so far."""
        name = str(self.monitor)
        if trainer.sanity_checking or self._unfinished(trainer):
            return
        found = {key: float(value) for key, value in trainer.callback_metrics.items()}
        if name not in found:
            raise NoEffectError(f'KeepBest.monitor is "{name}"; the module logs {", ".join(found) or "nothing"}.')
        sign = 1 if self.mode == "max" else -1
        better = self.step is None or sign * found[name] > sign * self.values[name]
        # one decision for all processes: a metric may not be the same on each
        if trainer.strategy.broadcast(better and math.isfinite(found[name])):
            self.step = trainer.global_step
            self.values = {key: value for key, value in found.items() if key.startswith("val_") or key == name}
            state = injected_root(pl_module).state_dict()
            self._tensors = {key: state[key].detach().clone() for key in adapter_keys(injected_root(pl_module))}

    @staticmethod
    def _unfinished(trainer: Trainer) -> list[str]:
        """Schedules after which the adapter is not yet, or not now, what is to be written."""
        schedules = [c for c in trainer.callbacks if isinstance(c, ScheduleCallback)]  # type: ignore[attr-defined]
        return [type(schedule).__name__ for schedule in schedules if not schedule.finished(trainer.global_step)]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best state back."""
        if self.step is None:
            return
        root = injected_root(pl_module)
        for name in records(root):
            make_room_for_folded(root, name, self._tensors)
        state = root.state_dict()
        for key, value in self._tensors.items():
            state[key].copy_(shard_like(value, state[key]))
        rewrite_weights(root)
        if trainer.is_global_zero:
            print(f"kept: the state of step {self.step}, {self.monitor} {self.values[str(self.monitor)]:.4f}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that there was nothing to choose from, after the last state has been written.

        Raises:
            NoEffectError: no validation that counts.
        """
        if self.step is None:
            waiting = ", ".join(self._unfinished(trainer)) or "the schedules"
            raise NoEffectError(
                f'KeepBest.monitor is "{self.monitor}"; no validation with a finite value came while {waiting} had '
                "finished, so the last state was written. Validate more often, or leave KeepBest out."
            )

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"step": self.step, "values": self.values, "tensors": gather_nested(self._tensors)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run compares with what came before."""
        self.step, self.values, self._tensors = state_dict["step"], state_dict["values"], state_dict["tensors"]
