"""WeightDecomposition: dM and dD of each layer between its start and its present weight, over training.

The measurement of Liu et al., 2024, arXiv:2402.09353, section 3.2, for any method and for full fine-tuning alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from ll_weight_change.recorder import LayerRecorder, present_weight
from ll_weight_change.records import FILENAME, FORMAT
from lora_lightning.adapters.weight_change import Axis, weight_change
from lora_lightning.errors import check


class WeightDecomposition(LayerRecorder):
    """Writes dM and dD of each layer at chosen optimizer steps into a file that `analyse` draws.

    Works in any Lightning project. Where the model has adapters, their layers are measured, with the merged weight;
    where it has none, every linear layer, convolution and embedding whose weight trains. Of layers whose base weight
    trains, a copy of the start weight stays on the CPU of the first process while the model trains.

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

    def __init__(
        self,
        at: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        layers: Sequence[str] | None = None,
        axis: Axis = "out",
        label: str | None = None,
        directory: str | Path | None = None,
        filename: str = FILENAME,
    ) -> None:
        super().__init__(at, layers, label, directory, filename)
        self.axis = axis
        check(axis in get_args(Axis), self, "axis", 'it must be "out" or "in".')

    def header(self) -> dict[str, Any]:
        """Format and axis."""
        return {"format": FORMAT, "axis": self.axis}

    def measure(self, layer: nn.Module, start: Callable[[], Tensor | None]) -> dict[str, Any] | None:
        """DM, dD, and how many vectors have no direction."""
        weight, began = present_weight(layer), start()
        if began is None:
            return None
        change = weight_change(weight, began.to(weight.device), self.axis)
        return {"dM": _number(change.magnitude), "dD": _number(change.direction), "skipped": change.skipped}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
