"""WeightDecomposition: dM and dD of each layer between its start and its present weight, over training.

The measurement of Liu et al., 2024, arXiv:2402.09353, section 3.2, for any method and for full fine-tuning alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from ll_weight_change.records import FILENAME, FORMAT
from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.weight_change import Axis, weight_change
from lora_lightning.callbacks.step_counting import REPORTS, StepCallback, announce, resolve_step, total_steps
from lora_lightning.errors import NoEffectError, ResumeError, SettingsError, TrainingError, check
from lora_lightning.injection.records import iter_adapters, records
from lora_lightning.models.base_layers import base_layer_of
from lora_lightning.storage.atomic import write_json


class WeightDecomposition(StepCallback):
    """Writes dM and dD of each layer at chosen optimizer steps into a file that `analyse` draws.

    Works in any Lightning project. Where the model has adapters, their layers are measured, with the merged weight;
    where it has none, every linear layer, convolution and embedding whose weight trains. A copy of the start weights of
    the measured layers stays on the CPU of the first process while the model trains.

    Args:
        at: optimizer steps to measure after; up to 1 a fraction of all steps, from 2 on a step number. The last step of
            the run is always measured.
        layers: regular expressions of which one must be found in a layer's path; None for all.
        axis: "out" compares rows of the weight, one an output; "in" compares columns, the paper's literal reading.
        label: name of the run in pictures; None takes the method's, or "full fine-tuning".
        directory: folder of the file; None takes the run folder.
        filename: name of the file.

    Raises:
        SettingsError: a value outside its rule, or a step beyond the end of the run.
        NoEffectError: no layer to measure.
    """

    phase: ClassVar[int] = REPORTS
    reads_base: ClassVar[bool] = True

    def __init__(
        self,
        at: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        layers: Sequence[str] | None = None,
        axis: Axis = "out",
        label: str | None = None,
        directory: str | Path | None = None,
        filename: str = FILENAME,
    ) -> None:
        super().__init__()
        self.at, self.layers, self.axis, self.label = tuple(at), layers, axis, label
        self.directory, self.filename = directory, filename
        check(
            all(moment > 0 for moment in at), self, "at", "each moment must be above 0: a fraction, or a step number."
        )
        check(axis in get_args(Axis), self, "axis", 'it must be "out" or "in".')
        check(not isinstance(layers, str), self, "layers", "it must be a list of regular expressions.")
        for pattern in layers or ():
            _compile(pattern)
        self._starts: dict[str, Tensor | None] = {}
        self._first = True
        self._steps: frozenset[int] = frozenset()
        self._records: list[dict[str, Any]] = []
        self._resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the weights that are there before any checkpoint is read, and take the place among callbacks."""
        if stage != "fit":
            return
        super().setup(trainer, pl_module, stage)
        self._first = trainer.is_global_zero
        self._starts = {path: self._copy(base.weight()) for path, base in self._plain(pl_module).items()}

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
        for path in found:
            if path in self._starts:
                continue
            if path not in adapted and self._resumed:
                raise ResumeError(
                    f"{type(self).__name__}: {path} was built after the checkpoint was chosen, so its weight at the "
                    "start of the run is unknown; build the model in __init__ to resume with this callback."
                )
            self._starts[path] = self._copy(_weight(adapted.get(path) or pl_module.get_submodule(path), start=True))
        self._starts = {path: self._starts[path] for path in found}
        self.label = self.label or _label(pl_module)

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
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the last step, where it was none of the chosen."""
        if trainer.global_step and (not self._records or self._records[-1]["step"] != trainer.global_step):
            self._measure(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the copies go."""
        self._starts = {}

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        """Record every layer, and write the file, so that a killed run keeps what was measured."""
        values = {}
        for path, start in self._starts.items():
            weight = _weight(module.get_submodule(path))  # gathered where it is sharded, so by every process
            if start is None:
                continue
            change = weight_change(weight, start.to(weight.device), self.axis)
            values[path] = {"dM": _number(change.magnitude), "dD": _number(change.direction), "skipped": change.skipped}
        self._records.append({"step": trainer.global_step, "layers": values})
        if trainer.is_global_zero:
            content = {"format": FORMAT, "label": self.label, "axis": self.axis, "records": self._records}
            write_json(Path(self.directory or trainer.default_root_dir) / self.filename, content)

    # -- layers --------------------------------------------------------------------------------------------------------

    def _accepts(self, path: str) -> bool:
        return self.layers is None or any(_compile(pattern).search(path) for pattern in self.layers)

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


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SettingsError(f'WeightDecomposition.layers: "{pattern}" is no regular expression: {error}.') from error


def _among(layers: Sequence[str] | None) -> str:
    return "" if layers is None else f", among paths with one of {', '.join(layers)}"


def _fixed(layer: AdaptedLayer) -> bool:
    """Whether one weight states what the layer computes."""
    return bool(layer.active) and all(layer.adapter(name).mergeable for name in layer.active)


def _weight(module: nn.Module, start: bool = False) -> Tensor:
    """The weight (d_out, d_in) that a layer applies now, or applied before its adapter trained."""
    if not isinstance(module, AdaptedLayer):
        base = base_layer_of(module)
        if base is None:
            raise TrainingError(f"a {type(module).__name__} has become a layer whose weight cannot be read.")
        return base.weight().detach()
    if start:
        return module.pretrained_weight(module.base_layer.dtype)
    return module.applied_weight(module.base_layer.adapter_dtype)


def _label(module: nn.Module) -> str:
    """The name of the first method injected into the model."""
    methods: list[Mapping[str, Any]] = [records(inner) for inner in module.modules()]
    names = [type(record.method).__name__ for found in methods for record in found.values()]
    return names[0] if names else "full fine-tuning"


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
