"""The linear baseline: what the task's head alone reaches on the frozen model's features.

Each batch of the run goes through the frozen parts once, in eval mode; their outputs are replayed for every candidate
rate, so the baseline costs one forward pass a step whatever the number of candidates, and no memory beyond a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW

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
        model: the model with its adapters disabled; its parameters are left as they are.
        heads: names of the parameters that train in full.
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
