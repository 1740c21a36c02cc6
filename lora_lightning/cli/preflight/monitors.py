"""Metrics that callbacks watch, compared with those that the run logs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback

from lora_lightning.callbacks.best import direction
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.errors import nearest
from lora_lightning.models.tasks.base import Task


def problems(callbacks: Sequence[Callback], task: Task, validates: bool) -> Iterator[str]:
    """One line for each callback that watches what nobody logs, or the wrong way round.

    Args:
        callbacks: those of the run.
        task: says what is measured.
        validates: whether the run has validation data.
    """
    measured = [f"val_{name}" for name in ("loss", *task.metrics(2))] if validates else []
    others = [name for one in callbacks if isinstance(one, ScheduleCallback) for name in _metrics(one)]
    logged = ["train_loss", *measured, "penalty", *others]
    for one in callbacks:
        monitor, owner = getattr(one, "monitor", None), type(one).__name__
        if not isinstance(monitor, str):
            continue
        if monitor not in logged:
            close = nearest(monitor.removeprefix("eval_"), logged, n=1)
            hint = f' Did you mean "{close[0]}"?' if close else ""
            why = "" if validates else " It has no validation data."
            shown = [name for name in logged if name != "penalty"]
            yield f'{owner}.monitor is "{monitor}"; the run logs {", ".join(shown)}.{hint}{why}'
            continue
        right, given = _direction(monitor, task), getattr(one, "mode", None)
        if right is not None and given in ("min", "max") and given != right:
            yield f'{owner}.mode is "{given}", but of {monitor} {_WORDS[right]} is better; set it to "{right}".'


_WORDS = {"min": "less", "max": "more"}


def _direction(monitor: str, task: Task) -> str | None:
    if monitor == f"val_{task.metric}":
        return "max" if task.higher_is_better else "min"
    return direction(monitor)


def _metrics(callback: Any) -> Sequence[str]:
    """Names of what a schedule logs; those that it cannot tell before it runs are left out."""
    try:
        return list(callback.metrics())
    except Exception:
        return ["sparsity", "rank", "stage"]
