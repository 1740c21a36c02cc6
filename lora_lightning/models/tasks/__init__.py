"""Tasks by name. A task is one file in this folder that holds one `Task` subclass; its fields are its settings."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from lora_lightning.errors import SettingsError, did_you_mean
from lora_lightning.models.tasks.base import Task


def all_tasks() -> dict[str, type[Task]]:
    """Every task by the name YAML uses."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {task.name: task for task in sorted(_below(Task), key=lambda task: task.name)}


def _below(cls: Any) -> Iterator[type[Task]]:
    for task in cls.__subclasses__():
        yield task
        yield from _below(task)


def find_task(name: str, settings: Mapping[str, Any] | None = None) -> Task:
    """The task called `name`, with `settings` other than its own.

    Raises:
        SettingsError: there is no such task, or it has no such setting, with the nearest; or a value outside its rule.
    """
    tasks = all_tasks()
    if name not in tasks:
        raise SettingsError(f'model.task is "{name}".{did_you_mean(name, tasks)} Tasks: {", ".join(tasks)}.')
    task, settings = tasks[name], settings or {}
    known: dict[str, Any] = {field.name: field.type for field in fields(task)} if is_dataclass(task) else {}
    for key in settings:
        if key not in known:
            takes = f"It takes: {', '.join(known)}." if known else "It has no settings."
            raise SettingsError(f'model.task_settings: {name} has no "{key}".{did_you_mean(key, known)} {takes}')
    try:
        return task(**settings)
    except TypeError as error:  # a rule that met a value of another type
        raise SettingsError(f"model.task_settings is {dict(settings)}; {name} takes {known}.") from error
