"""Settings that were given and would do nothing beside the others: refused before anything is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer

from lora_lightning.callbacks.beside import refuse_beside
from lora_lightning.errors import SettingsError
from lora_lightning.models.tasks.base import Task
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.registry import arguments


def without_effect(module: Any, trainer: Trainer | None, data: Any) -> Iterator[SettingsError]:
    """One error for each setting that would do nothing, and for a callback that cannot work beside adapters.

    Args:
        module: an AdapterModule.
        trainer: that of the run; None where it is not known.
        data: the data module; None where there is none.
    """
    yield from _of_task(module)
    yield from _of_data(data)
    if trainer is not None:
        yield from _of_trainer(trainer)
        try:
            refuse_beside(trainer.callbacks, module)  # type: ignore[attr-defined]
        except SettingsError as error:
            yield error


def _of_task(module: Any) -> Iterator[SettingsError]:
    task: Task = module.task
    given = {
        "num_labels": task.has_head or "has no head of classes",
        "max_new_tokens": task.generates or "generates no text",
        "loss_head": task.by_loss_head or "computes no loss by tokens of a language model",
    }
    for name, why in given.items():
        value = getattr(module, name)
        if why is not True and value != arguments(type(module))[name].default:
            yield SettingsError(f'model.{name} is {json.dumps(value)}, but the task "{task.name}" {why}. Leave it out.')
    if module.half_adapters and str(module.dtype_name) in ("None", "float32") and not _half(module):
        yield SettingsError(
            "model.half_adapters is True, but frozen weights are float32, so that adapters are, too. Leave it out, or "
            "set trainer.precision to bf16-true."
        )


def _half(module: Any) -> bool:
    """Whether frozen weights may be in half precision by other settings."""
    trainer = module._trainer
    return module.quantization is not None or trainer is None or str(trainer.precision) not in ("32-true", "64-true")


def _of_data(data: Any) -> Iterator[SettingsError]:
    """Settings of streams, without one."""
    if data is None or getattr(data, "streaming", True):
        return
    for name in ("shuffle_block", "held_out_rows"):
        value, known = getattr(data, name, None), arguments(type(data)).get(name)
        if known is not None and value != known.default:
            yield SettingsError(
                f"{type(data).__name__}.{name} is {value!r}, but streaming is False, and only streams have it. Leave "
                "it out, or set streaming to true."
            )


def _of_trainer(trainer: Trainer) -> Iterator[SettingsError]:
    if trainer.limit_train_batches == 0:
        yield SettingsError("trainer.limit_train_batches is 0, so that nothing would be trained; null takes all.")
    every = trainer.check_val_every_n_epoch
    if every is not None and every < 1:
        yield SettingsError(
            f"trainer.check_val_every_n_epoch is {every}; it must be at least 1, or null, with which "
            "val_check_interval counts batches of the whole run. trainer.limit_val_batches 0 leaves validation out."
        )
    clip, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    if clip is not None and not clip >= 0:  # which a number that is none is neither
        yield SettingsError(
            f"trainer.gradient_clip_val is {clip}, which would spoil gradients or turn them round; it must be above 0, "
            "or null."
        )
    if algorithm is not None and not clip:
        name = getattr(algorithm, "value", algorithm)
        yield SettingsError(
            f'trainer.gradient_clip_algorithm is "{name}", but trainer.gradient_clip_val is {clip}, so that nothing is '
            "clipped. Set the value too, or leave both out."
        )


def unscheduled(schedule: WarmUp) -> str:
    """What to print of a run that nothing but time bounds, whose rate so stays as it is.

    Raises:
        SettingsError: a schedule was given, beyond the default one.
    """
    if schedule not in (WarmUp(), WarmUp(warmup_fraction=0.0, decay="constant")):
        raise SettingsError(
            f'model.lr_scheduler.decay is "{schedule.decay}" with warmup_fraction {schedule.warmup_fraction:g}, but '
            "neither trainer.max_steps nor trainer.max_epochs bounds the run, so that nobody knows its length. Set one."
        )
    return "note: nothing but time bounds the run, so that the rate stays as it is; trainer.max_steps gives it a decay"


def check_validation_comes(trainer: Trainer) -> str:
    """What to print of a run that has validation data and ends before it validates; empty for others.

    Raises:
        SettingsError: a callback waits for what validation measures.
    """
    first, last = _first_validation(trainer), _batches(trainer)
    by_time = getattr(trainer, "_val_check_time_interval", None) is not None
    if not trainer.enable_validation or by_time or first <= last:
        return ""
    every = trainer.check_val_every_n_epoch
    setting = "val_check_interval" if every in (None, 1) else "check_val_every_n_epoch"
    value = trainer.val_check_interval if every in (None, 1) else every
    said = f"trainer.{setting} is {value}, and the run ends after {last:g} batches, before it validates"
    waiting = [c for c in trainer.callbacks if str(getattr(c, "monitor", None)).startswith("val_")]  # type: ignore[attr-defined]
    if waiting:
        name = type(waiting[0]).__name__
        raise SettingsError(f'{said}, but {name} waits for "{waiting[0].monitor}". Give a smaller one.')
    return f"note: {said}; a smaller one measures on the way"


def _first_validation(trainer: Trainer) -> float:
    """Batches before the first validation."""
    batch, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if batch is None or math.isinf(batch):
        batch = trainer.num_training_batches
    return float(batch) if epochs is None else (epochs - 1) * float(trainer.num_training_batches) + float(batch)


def _batches(trainer: Trainer) -> float:
    """Batches of the whole run."""
    bounds = [math.inf]
    if trainer.max_steps is not None and trainer.max_steps >= 0:
        bounds.append(trainer.max_steps * trainer.accumulate_grad_batches)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        bounds.append(trainer.max_epochs * float(trainer.num_training_batches))
    return min(bounds)
