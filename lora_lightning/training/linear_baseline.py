"""LinearBaseline: what the task's head alone reaches on the frozen model's features, measured before training.

Each batch of the run goes through the frozen parts once, in eval mode; their outputs are replayed for every candidate
rate, so the baseline costs one forward pass a step whatever the number of candidates, and no memory beyond a batch.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW
from torch.utils.data import DistributedSampler

from lora_lightning.callbacks.step_counting import JUDGES, outside_step, total_steps
from lora_lightning.distributed import is_sharded, reshard
from lora_lightning.injection.also_train import trained_parameters
from lora_lightning.injection.records import injected_root, records
from lora_lightning.injection.switches import disable_adapters
from lora_lightning.models.anatomy import survey
from lora_lightning.models.tasks.base import Batch, PredictContext, Task, evaluate, metrics, update_metrics
from lora_lightning.optim.warmup import WarmUp

RATES = (1e-3, 3e-3, 1e-2)
"""Candidate learning rates; the best by validation metric counts."""


@dataclass(frozen=True)
class Baseline:
    """Validation metrics before training, and of the best head trained alone."""

    untrained: dict[str, float]
    linear: dict[str, float] | None = None
    rate: float | None = None
    by_rate: Mapping[float, float] | None = None


class FrozenParts:
    """The largest parts of a model without a head parameter: run once a batch, then replayed."""

    def __init__(self, model: nn.Module, heads: Sequence[str]) -> None:
        self.model = model
        self.parts = list(_without(model, "", set(heads)))
        self._outputs: list[list[Any]] = []
        self._replay: list[Iterator[Any]] | None = None

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Eval mode and one computation a batch for the parts; restored on leaving."""
        modes = {module: module.training for module in self.model.modules()}
        for index, part in enumerate(self.parts):
            part.eval()
            part.forward = partial(self._forward, index, part.forward)
        try:
            yield
        finally:
            for part in self.parts:
                del part.forward
            for module, mode in modes.items():
                module.training = mode

    def _forward(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._replay is not None:
            return next(self._replay[index])
        with torch.no_grad():
            output = original(*args, **kwargs)
        self._outputs[index].append(output)
        return output

    def logits(self, task: Task, batch: Batch, candidates: Sequence[Mapping[str, Tensor]]) -> Iterator[Tensor]:
        """Logits of a batch for each set of head parameters in turn."""
        self._outputs, self._replay = [[] for _ in self.parts], None
        for head in candidates:
            yield task.logits(partial(_call, self.model, head), batch)
            self._replay = [iter(outputs) for outputs in self._outputs]


def _call(model: nn.Module, head: Mapping[str, Tensor], **inputs: Any) -> Any:
    return functional_call(model, dict(head), (), inputs)


def _without(module: nn.Module, prefix: str, heads: set[str]) -> Iterator[nn.Module]:
    names = [f"{prefix}{name}" for name, _ in module.named_parameters()]
    if not names:
        return
    container = isinstance(module, nn.ModuleList | nn.ModuleDict)
    if not heads.intersection(names) and not container:
        yield module
        return
    for name, child in module.named_children():
        yield from _without(child, f"{prefix}{name}.", heads)


def fit_baseline(
    model: nn.Module,
    heads: Sequence[str],
    task: Task,
    windows: Iterable[Sequence[Batch]],
    validation: Callable[[], Iterable[Batch]],
    steps: int,
    schedule: WarmUp,
    average: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    context: PredictContext = PredictContext(),  # noqa: B008 - frozen
) -> Baseline:
    """Train the heads alone at each candidate rate, and measure them beside the untrained ones.

    Args:
        model: the model as it is before training, its adapters disabled unless the run begins with trained ones; its
            parameters are left as they are.
        heads: names of the parameters that are fully trained.
        task: loss and metrics.
        windows: the run's batches, one sequence an optimizer step.
        validation: makes an iterator over validation batches.
        steps: optimizer steps; 0 measures the untrained heads only.
        schedule: warm-up and decay, as in the run.
        average: mean of a gradient over processes.
        context: what a task without a head needs to measure texts.
    """
    if not steps:
        return Baseline(evaluate(task, model, validation(), context))
    start = {name: model.get_parameter(name).detach() for name in heads}
    candidates = [{n: p.clone().requires_grad_() for n, p in start.items()} for _ in RATES]
    optimizers = [AdamW(head.values(), lr=rate) for head, rate in zip(candidates, RATES, strict=False)]
    schedulers = [schedule.schedule(optimizer, steps) for optimizer in optimizers]
    frozen = FrozenParts(model, heads)
    with frozen.patched():
        for window in itertools.islice(windows, steps):
            for batch in window:
                for logits in frozen.logits(task, batch, candidates):
                    loss = task.loss(logits, batch)
                    (loss.total / loss.count.clamp_min(1) / len(window)).backward()
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                _replace_gradients(optimizer, average)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        with torch.no_grad():
            results = _evaluate(frozen, model, task, validation(), [start, *candidates])
    untrained, trained = results[0], dict(zip(RATES, results[1:], strict=False))
    sign = 1 if task.higher_is_better else -1
    rate = max(trained, key=lambda r: sign * trained[r][task.metric])
    return Baseline(untrained, trained[rate], rate, {r: result[task.metric] for r, result in trained.items()})


def _replace_gradients(optimizer: AdamW, average: Callable[[Tensor], Tensor]) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = average(parameter.grad)


def _evaluate(
    frozen: FrozenParts,
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    candidates: Sequence[Mapping[str, Tensor]],
) -> list[dict[str, float]]:
    model.eval()
    collections = [metrics(task, model) for _ in candidates]
    for batch in batches:
        for collection, logits in zip(collections, frozen.logits(task, batch, candidates), strict=True):
            update_metrics(task, collection.to(logits.device), logits, batch)
    return [{name: float(value) for name, value in collection.compute().items()} for collection in collections]


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
        start = getattr(module, "start", None)  # trained adapters, which are what the run begins with
        comparable = start is None and self.enabled and module.task.has_head and heads and heads == every_head
        if is_sharded(root):
            if comparable and trainer.is_global_zero:
                print("linear baseline: not fitted, because the model is sharded; a run under DDP fits one", flush=True)
            heads, comparable = [], False
        steps = (total_steps(trainer) or 0) if comparable else 0
        began = time.monotonic()
        if steps and trainer.is_global_zero:
            print(f"linear baseline: the head alone, {steps} steps on frozen features ...", flush=True)
        with torch.random.fork_rng(), disable_adapters(root) if start is None else nullcontext():
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
