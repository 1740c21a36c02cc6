"""LinearBaseline: measures the model before training, and the head trained alone for as many steps."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DistributedSampler

from lora_lightning.callbacks.steps import JUDGES, outside_step, total_steps
from lora_lightning.distributed import is_sharded, reshard
from lora_lightning.injection.also_train import trained_parameters
from lora_lightning.injection.records import injected_root, records
from lora_lightning.injection.switches import disable_adapters
from lora_lightning.models.anatomy import survey
from lora_lightning.training.baseline_fit import Baseline, fit_baseline


class LinearBaseline(Callback):
    """Runs before the first step of an AdapterModule; the run's random numbers and parameters are left as they were.

    Args:
        enabled: False measures the untrained model only.
    """

    phase: ClassVar[int] = JUDGES

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.result: Baseline | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit and print the baseline, unless a resumed run knows it already."""
        if self.result is not None:
            return
        if not trainer.enable_validation:
            self.result = Baseline({})
            return
        module: Any = pl_module
        root = injected_root(module.model)
        trained = {name for record in records(root).values() for name in record.trained}
        every_head = trained_parameters(survey(root), "heads")
        heads = [name for name in every_head if name in trained]
        comparable = self.enabled and module.task.has_head and heads and heads == every_head
        if is_sharded(root):
            if comparable and trainer.is_global_zero:
                print("linear baseline: not fitted, because the model is sharded; a run under DDP fits one", flush=True)
            heads, comparable = [], False
        steps = (total_steps(trainer) or 0) if comparable else 0
        began = time.monotonic()
        if steps and trainer.is_global_zero:
            print(f"linear baseline: the head alone, {steps} steps on frozen features ...", flush=True)
        with torch.random.fork_rng(), disable_adapters(root):
            torch.manual_seed(0)
            self.result = outside_step(
                trainer,
                lambda: fit_baseline(
                    root,
                    heads,
                    module.task,
                    _windows(trainer),
                    lambda: validation_batches(trainer),
                    steps,
                    module.lr_scheduler,
                    lambda gradient: cast(Tensor, trainer.strategy.reduce(gradient, reduce_op="mean")),
                    module.predict_context(),
                ),
            )
        reshard(root)
        if self.result.linear is not None and trainer.is_global_zero:
            metric = module.task.metric
            rates = ", ".join(f"{value:.4f} at {rate:g}" for rate, value in (self.result.by_rate or {}).items())
            print(
                f"linear baseline: val_{metric} {self.result.linear[metric]:.4f} "
                f"(best of {rates}; {time.monotonic() - began:.0f} s)",
                flush=True,
            )

    def state_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"result": None if self.result is None else dataclasses.asdict(self.result)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run keeps the result."""
        self.result = None if state_dict["result"] is None else Baseline(**state_dict["result"])


def _train_loader(trainer: Trainer) -> Any:
    datamodule = getattr(trainer, "datamodule", None)
    return copy.copy(trainer.train_dataloader) if datamodule is None else datamodule.train_dataloader()


def validation_batches(trainer: Trainer) -> Iterator[Any]:
    """The batches one validation sees, on the device."""
    datamodule = getattr(trainer, "datamodule", None)
    if not trainer.enable_validation:
        return iter(())
    loaders = trainer.val_dataloaders if datamodule is None else datamodule.val_dataloader()
    numbers: Sequence[float] = trainer.num_val_batches
    limit = None if not numbers or numbers[0] == float("inf") else int(numbers[0])
    return _on_device(trainer, itertools.islice(loaders or (), limit))


def _on_device(trainer: Trainer, batches: Iterable[Any]) -> Iterator[Any]:
    return (trainer.strategy.batch_to_device(batch) for batch in batches)


def _windows(trainer: Trainer) -> Iterator[list[Any]]:
    """The run's batches, epoch after epoch, grouped into accumulation windows."""
    loader = _train_loader(trainer)
    for epoch in itertools.count():
        for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
        batches = _on_device(trainer, itertools.islice(loader, int(trainer.num_training_batches)))
        while window := list(itertools.islice(batches, trainer.accumulate_grad_batches)):
            yield window
