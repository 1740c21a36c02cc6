"""What a method is told before its adapters are built: batches of the training data, or the plan of the run it goes on.

A method that asks for calibration batches gets the first ones of a training loader of its own, whose order and position
no other loader shares; data that can be read only once would be missing in training, and are refused. An answer that
took long is kept on the disk (`training.kept_answers`).

A run that is resumed asks nothing again: its plan stands in the checkpoint, which is read here where
`trainer.ckpt_path` is set before `fit`, as the command line does. A path that is given to `fit` itself is hidden until
the adapter is built; then the plan is asked for again, and compared when the checkpoint is loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lora_lightning.errors import DataError
from lora_lightning.injection.plan import batches_read
from lora_lightning.injection.probe import Probe
from lora_lightning.methods import Method, Plan
from lora_lightning.models.tasks.base import Batch, Task
from lora_lightning.models.tasks.gathering import alone
from lora_lightning.storage.checkpoint import check_checkpoint
from lora_lightning.training.kept_answers import KeptAnswers

SECTION = "lora_lightning"


def calibration(method: Method, task: Task, trainer: Trainer | None) -> Probe | None:
    """A probe on the first training batches, on the device that trains; None without a run, or where none is needed.

    Raises:
        DataError: the method needs batches, and there is no data module that has them, or one that has them only once.
    """
    count = batches_read(method)
    if not count or trainer is None:
        return None
    data = getattr(trainer, "datamodule", None)
    if data is None:
        raise DataError(
            f"{type(method).__name__} reads {count} batches of training data before it is built, and there is no data "
            "module; give one to the trainer, or inject in Python with a Probe."
        )

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with alone():  # one process asks while others wait
            if task.needs_reference:  # before there is an adapter, the model is its own
                with torch.no_grad():
                    batch = {**batch, "reference": task.reference(task.logits(model, batch))}
            summed = task.loss_of(model, batch)
        return summed.total / summed.count.clamp_min(1)

    # a model that is to be sharded may be too large for one device, so it is read where it is
    fits = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    with torch.random.fork_rng(devices=()):  # a loader's iterator draws a number
        batches = list(itertools.islice(_loader(method, data), count))
    device = trainer.strategy.root_device if fits else None
    return Probe(batches, loss, device, KeptAnswers(method, task, device))


def _loader(method: Method, data: Any) -> Iterable[Any]:
    """A training loader of its own.

    Raises:
        DataError: it gives its batches only once, or is not one loader.
    """
    loader = data.train_dataloader()
    rows = getattr(loader, "dataset", None)
    once = None
    if isinstance(loader, Iterator):
        once = f"train_dataloader() gives an iterator ({type(loader).__name__})"
    elif isinstance(rows, IterableDataset) and iter(rows) is iter(rows):
        once = f"{type(rows).__name__}.__iter__ gives the same iterator each time"
    way = "or inject in Python with a Probe"
    reads = f"{type(method).__name__} reads batches of training data before it is built"
    if once:
        raise DataError(
            f"{reads}, and {type(data).__name__} has them only once: {once}, so they would be missing in training. "
            f"Let it begin anew, {way}."
        )
    if isinstance(loader, Mapping | list | tuple):
        raise DataError(
            f"{reads}, and {type(data).__name__}.train_dataloader() gives a {type(loader).__name__} of loaders. "
            f"Return one loader, {way}."
        )
    return cast("Iterable[Any]", loader)


def planned(trainer: Trainer | None) -> Plan | None:
    """The plan in the checkpoint that the trainer goes on from; None where it starts anew, or the path is hidden.

    Raises:
        ResumeError: the checkpoint is truncated or damaged.
    """
    path = None if trainer is None else trainer.ckpt_path
    if path is None or not Path(path).is_file():
        return None
    check_checkpoint(path)
    checkpoint: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    description: Mapping[str, Any] = checkpoint.get(SECTION, {})
    plan: Plan = description.get("plan", {})
    return plan
