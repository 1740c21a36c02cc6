"""LayerRecorder: what a recorder of layers against their start weights needs, whatever it measures of them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from tqdm import tqdm

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.callbacks.step_counting import REPORTS, StepCallback, announce, resolve_step, total_steps
from lora_lightning.errors import NoEffectError, ResumeError, SettingsError, TrainingError, check
from lora_lightning.injection.records import iter_adapters, records
from lora_lightning.models.base_layers import base_layer_of
from lora_lightning.storage.atomic import write_json

SILENT = 3.0
"""Seconds without a bar."""


class LayerRecorder(StepCallback, ABC):
    """Measures layers against their start weights at chosen optimizer steps, and writes what it found; abstract.

    Works in any Lightning project. Where the model has adapters, their layers are measured, with the merged weight;
    where it has none, every linear layer, convolution and embedding whose weight trains. Of layers whose base weight
    trains, a copy of the start weight stays on the CPU of the first process while the model trains.

    A subclass says what it measures (`measure`), and what stands in its file beside the records (`header`).
    """

    phase: ClassVar[int] = REPORTS
    reads_base: ClassVar[bool] = True

    def __init__(
        self,
        at: Sequence[float],
        layers: Sequence[str] | None,
        label: str | None,
        directory: str | Path | None,
        filename: str,
    ) -> None:
        super().__init__()
        self.at, self.layers, self.label = tuple(at), layers, label
        self.directory, self.filename = directory, filename
        check(
            all(moment > 0 for moment in at), self, "at", "each moment must be above 0: a fraction, or a step number."
        )
        check(not isinstance(layers, str), self, "layers", "it must be a list of regular expressions.")
        for pattern in layers or ():
            _compile(pattern, self)
        self._copies: dict[str, Tensor | None] = {}
        self._found: list[str] = []
        self._first = True
        self._steps: frozenset[int] = frozenset()
        self._records: list[dict[str, Any]] = []
        self._resumed = False

    @abstractmethod
    def header(self) -> dict[str, Any]:
        """What stands in the file beside label and records; its format among it."""

    @abstractmethod
    def measure(self, layer: nn.Module, start: Callable[[], Tensor | None]) -> dict[str, Any] | None:
        """Numbers of one layer.

        Weights may be sharded, so every process reads the same ones, in the same order.

        Args:
            layer: an adapted layer, or a plain one.
            start: reads the weight that it began with; None on processes that have nothing to measure.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the weights that are there before any checkpoint is read, and take the place among callbacks."""
        if stage != "fit":
            return
        super().setup(trainer, pl_module, stage)
        self._first = trainer.is_global_zero
        self._copies = {path: self._copy(base.weight()) for path, base in self._plain(pl_module).items()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the layers and complete the copies.

        Raises:
            NoEffectError: no layer to measure.
            ResumeError: the start weights of a resumed run are gone.
        """
        adapted = dict(iter_adapters(pl_module))
        if adapted:
            found = [path for path, layer in adapted.items() if self._accepts(path) and _fixed(layer)]
        else:
            found = [path for path, base in self._plain(pl_module).items() if base.stored.requires_grad]
        if not found:
            raise NoEffectError(
                f"{type(self).__name__} found nothing to measure: it needs layers with a mergeable adapter, or without "
                f"adapters layers whose weight trains{_among(self.layers)}."
            )
        announce(trainer, self, "measures", "layer", found)
        copied = [path for path in found if path not in adapted or adapted[path].base_layer.stored.requires_grad]
        for path in copied:
            if path in self._copies:
                continue
            if self._resumed:
                raise ResumeError(
                    f"{type(self).__name__}: {path} was built after the checkpoint was chosen, so its weight at the "
                    "start of the run is unknown; build the model in __init__ to resume with this callback."
                )
            self._copies[path] = self._copy(start_weight(adapted.get(path) or pl_module.get_submodule(path)))
        self._copies = {path: self._copies[path] for path in copied}
        self._found = found
        self.label = self.label or label_of(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the moments against the length of the run."""
        super().on_train_start(trainer, pl_module)
        total = total_steps(trainer)
        steps = [max(1, resolve_step(moment, total, f"{type(self).__name__}.at")) for moment in self.at]
        if total is not None and max(steps, default=0) > total:
            raise SettingsError(f"{type(self).__name__}.at holds step {max(steps)}; the run has {total} steps.")
        self._steps = frozenset(steps)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Measure after a chosen step."""
        if step in self._steps:
            self._record(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the last step, where it was none of the chosen."""
        if trainer.global_step and (not self._records or self._records[-1]["step"] != trainer.global_step):
            self._record(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the copies go."""
        self._copies = {}

    def _record(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure every layer, and write the file, so that a killed run keeps what was measured."""
        values = {}
        told, quiet = f"{type(self).__name__}: measuring", not self._first
        for path in tqdm(self._found, delay=SILENT, desc=told, unit=" layers", leave=False, disable=quiet):
            layer = module.get_submodule(path)
            numbers = self.measure(layer, partial(self._start, path, layer))
            if numbers is not None:
                values[path] = numbers
        self._records.append({"step": trainer.global_step, "layers": values})
        if trainer.is_global_zero:
            content = {**self.header(), "label": self.label, "records": self._records}
            write_json(Path(self.directory or trainer.default_root_dir) / self.filename, content)

    def _start(self, path: str, layer: nn.Module) -> Tensor | None:
        """The weight that a layer began with; one that does not train is still there."""
        if path in self._copies:
            return self._copies[path]
        weight = start_weight(layer)  # gathered where it is sharded, so by every process
        return weight if self._first else None

    # -- layers --------------------------------------------------------------------------------------------------------

    def _accepts(self, path: str) -> bool:
        return self.layers is None or any(_compile(pattern, self).search(path) for pattern in self.layers)

    def _copy(self, weight: Tensor) -> Tensor | None:
        """A copy on the CPU, of the first process alone."""
        return weight.detach().to("cpu", copy=True) if self._first else None

    def _plain(self, module: nn.Module) -> dict[str, BaseLayer]:
        """Layers without adapters, by path."""
        inside = tuple(f"{path}." for path, _ in iter_adapters(module))
        found = {}
        for path, layer in module.named_modules():
            if isinstance(layer, AdaptedLayer) or path.startswith(inside) or not self._accepts(path):
                continue
            base = base_layer_of(layer)
            if base is not None and not base.stored.is_meta:
                found[path] = base
        return found

    # -- resuming ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {"records": self._records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured before."""
        self._records, self._resumed = list(state_dict["records"]), True


def start_weight(layer: nn.Module) -> Tensor:
    """The weight (d_out, d_in) that a layer holds, or that an adapted layer held before anything was learned."""
    if isinstance(layer, AdaptedLayer):
        return layer.pretrained_weight(layer.base_layer.dtype)
    return _plain_weight(layer)


def present_weight(layer: nn.Module) -> Tensor:
    """The weight (d_out, d_in) that a layer applies now, an adapted one in the dtype of adapters."""
    if isinstance(layer, AdaptedLayer):
        return layer.applied_weight(layer.base_layer.adapter_dtype)
    return _plain_weight(layer)


def _plain_weight(layer: nn.Module) -> Tensor:
    base = base_layer_of(layer)
    if base is None:
        raise TrainingError(f"a {type(layer).__name__} has become a layer whose weight cannot be read.")
    return base.weight().detach()


def label_of(module: nn.Module) -> str:
    """The name of the first method injected into the model."""
    methods: list[Mapping[str, Any]] = [records(inner) for inner in module.modules()]
    names = [type(record.method).__name__ for found in methods for record in found.values()]
    return names[0] if names else "full fine-tuning"


def _compile(pattern: str, recorder: LayerRecorder) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        name = type(recorder).__name__
        raise SettingsError(f'{name}.layers: "{pattern}" is no regular expression: {error}.') from error


def _among(layers: Sequence[str] | None) -> str:
    return "" if layers is None else f", among paths with one of {', '.join(layers)}"


def _fixed(layer: AdaptedLayer) -> bool:
    """Whether one weight states what the layer computes."""
    return bool(layer.active) and all(layer.adapter(name).mergeable for name in layer.active)
