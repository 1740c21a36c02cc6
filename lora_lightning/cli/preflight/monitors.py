"""Metrics that callbacks watch, compared with those that the run logs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback

from lora_lightning.callbacks.best import direction
from lora_lightning.callbacks.schedule import ScheduleCallback
from lora_lightning.errors import nearest
from lora_lightning.models.tasks.base import Task
from lora_lightning.registry import one_line


def problems(callbacks: Sequence[Callback], task: Task, validates: bool) -> Iterator[str]:
    """One line for each callback that watches what nobody logs, or the wrong way round.

    Args:
        callbacks: those of the run.
        task: says what is measured.
        validates: whether the run has validation data.
    """
    measured = [f"val_{name}" for name in ("loss", *task.metrics(2))] if validates else []
    others, silent = _of_schedules(callbacks)
    logged = ["train_loss", *measured, "penalty", *others]
    for one in callbacks:
        monitor, owner = getattr(one, "monitor", None), getattr(one, "place", type(one).__name__)
        if not isinstance(monitor, str):
            continue
        if monitor not in logged:
            close = nearest(monitor.removeprefix("eval_"), logged, n=1)
            hint = f' Did you mean "{close[0]}"?' if close else ""
            why = "" if validates else " It has no validation data."
            shown = [name for name in logged if name != "penalty"]
            yield f'{owner}.monitor is "{monitor}"; the run logs {", ".join(shown)}.{hint}{why}{silent}'
            continue
        right, given = direction(monitor, task), getattr(one, "mode", None)
        if right is not None and given in ("min", "max") and given != right:
            yield f'{owner}.mode is "{given}", but of {monitor} {_WORDS[right]} is better; set it to "{right}".'


def validates(data: Any) -> bool:
    """Whether there are validation data, as far as the settings of a data module say."""
    sources = getattr(data, "sources", None)
    return sources is None or sources.validation is not None or sources.validation_fraction > 0


def strangers(callbacks: Sequence[Callback]) -> list[str]:
    """Classes of callbacks that may log what nobody here knows of."""
    known = ("lightning", "lora_lightning")
    return [
        type(one).__name__
        for one in callbacks
        if not isinstance(one, ScheduleCallback) and type(one).__module__.partition(".")[0] not in known
    ]


_WORDS = {"min": "less", "max": "more"}


def _of_schedules(callbacks: Sequence[Callback]) -> tuple[list[str], str]:
    """Names of what schedules log, and a sentence on those that cannot tell before they run."""
    names: list[str] = []
    silent = ""
    for one in callbacks:
        if isinstance(one, ScheduleCallback):
            try:
                names += one.metric_names()
            except Exception as error:  # a plugin's
                owner = type(one).__name__
                silent += f" {owner} cannot say what it logs ({one_line(error)}); its metric_names() would tell."
    return names, silent
