"""What a module says of a set of batches: one value a metric, without a trace in its training.

A module that has `measure_batches(batches)` is asked; any other runs its own `validation_step` on each batch, and what
that logs or returns counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric
from tqdm import tqdm

from lora_lightning.callbacks.step_counting import outside_step
from lora_lightning.distributed import reshard, summed_over_all
from lora_lightning.errors import SettingsError

Measure = Callable[[LightningModule, Iterable[Any]], Mapping[str, float]]
"""Values of a module on batches, which are on its device."""
SILENT = 3.0
"""Seconds without a bar."""


@torch.no_grad()
def set_values(
    trainer: Trainer,
    module: LightningModule,
    batches: Callable[[], Iterable[Any]],
    told: str,
    measure: Measure | None = None,
) -> dict[str, float]:
    """Values of a module in eval mode on a set; every process takes part.

    Modes, random numbers and states of metrics come back as they were.

    Args:
        trainer: of the run.
        module: what is measured.
        batches: opens the set; loaders draw random numbers where they begin.
        told: what the progress bar says.
        measure: gives the values; None asks the module.

    Raises:
        SettingsError: nothing says what to measure.
    """
    own = getattr(module, "measure_batches", None)
    asked: Callable[[Iterable[Any]], Mapping[str, float]]
    if measure is not None:
        asked = lambda there: measure(module, there)  # noqa: E731
    elif own is not None:
        asked = own
    else:
        asked = lambda there: _logged(trainer, module, there)  # noqa: E731
    with _aside(module), trainer.precision_plugin.forward_context():
        quiet = not trainer.is_global_zero
        bar = tqdm(batches(), delay=SILENT, desc=told, unit=" batches", leave=False, disable=quiet)
        there = (trainer.strategy.batch_to_device(batch) for batch in bar)
        values = outside_step(trainer, lambda: asked(there))
    reshard(module)
    return {name: float(value) for name, value in values.items()}


class _Means:
    """Means over examples, of all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, value: Any, weight: float) -> None:
        total, count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = total + weight * float(value), count + weight

    def values(self, device: torch.device) -> dict[str, float]:
        if not self._sums:
            return {}
        sums = torch.tensor(list(self._sums.values()), dtype=torch.float64)
        if dist.is_initialized():
            sums = summed_over_all(sums.to(device))
        return {name: float(total / count) for name, (total, count) in zip(self._sums, sums, strict=True)}


class _Logged:
    """Stands in for the module's `log` and `log_dict` while its own validation hooks run."""

    def __init__(self) -> None:
        self.means, self.metrics = _Means(), dict[str, Metric]()
        self.size = 1
        """Examples of the batch at hand."""

    def log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """Add to a mean over examples; a metric has its own."""
        if isinstance(value, Metric):
            self.metrics[name] = value
        else:
            self.means.add(name, value, batch_size or self.size)

    def log_dict(self, values: Mapping[str, Any], *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """Each of them."""
        for name, value in values.items():
            self.log(name, value, batch_size=batch_size)


def _logged(trainer: Trainer, module: LightningModule, batches: Iterable[Any]) -> dict[str, float]:
    """What `validation_step` and the hooks around it log, and single numbers that it returns under other names."""
    if not is_overridden("validation_step", module):
        raise SettingsError(
            f"{type(module).__name__} has no validation_step, so nothing says what to measure. Write one, or "
            "measure_batches(batches), or give the callback measure(module, batches)."
        )
    logged, returned = _Logged(), _Means()
    with _instead(module, log=logged.log, log_dict=logged.log_dict):
        module.on_validation_epoch_start()
        for number, batch in enumerate(batches):
            logged.size = extract_batch_size(batch)
            output = trainer.strategy.validation_step(batch, number)
            for name, value in (output if isinstance(output, Mapping) else {"loss": output}).items():
                if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
                    returned.add(name, value, logged.size)
        logged.size = 1
        module.on_validation_epoch_end()
    device = trainer.strategy.root_device
    own = {name: metric.compute() for name, metric in logged.metrics.items()}
    values = {**returned.values(device), **logged.means.values(device), **own}
    if not values:
        raise SettingsError(
            f"{type(module).__name__}.validation_step neither logs nor returns a number, so nothing is measured. Log "
            "one, write measure_batches(batches), or give the callback measure(module, batches)."
        )
    return values


@contextmanager
def _instead(module: LightningModule, **methods: Any) -> Iterator[None]:
    """Other methods for a while."""
    for name, method in methods.items():
        setattr(module, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(module, name)


@contextmanager
def _aside(module: LightningModule) -> Iterator[None]:
    """Eval mode, empty metrics and random numbers of its own; all come back."""
    modes = {part: part.training for part in module.modules()}
    metrics = {part: _state(part) for part in modes if isinstance(part, Metric)}
    for metric in metrics:
        metric.reset()
    module.eval()
    try:
        with isolate_rng():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for metric, state in metrics.items():
            metric.reset()
            metric.__dict__.update(state)


def _state(metric: Metric) -> dict[str, Any]:
    """What a metric has gathered."""
    names = [*metric._defaults, "_update_count", "_computed"]
    return {name: copy.copy(metric.__dict__[name]) for name in names if name in metric.__dict__}
