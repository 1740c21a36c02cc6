"""Tasks by name. A task is one file in this folder that holds one `Task` subclass."""

from __future__ import annotations

import importlib
import pkgutil

from lora_lightning.errors import SettingsError, did_you_mean
from lora_lightning.tasks.base import Task


def all_tasks() -> dict[str, type[Task]]:
    """Every task by the name YAML uses."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {task.name: task for task in sorted(Task.__subclasses__(), key=lambda task: task.name)}


def find_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        SettingsError: there is none, with the nearest.
    """
    tasks = all_tasks()
    if name not in tasks:
        raise SettingsError(f'model.task is "{name}".{did_you_mean(name, tasks)} Tasks: {", ".join(tasks)}.')
    return tasks[name]()
