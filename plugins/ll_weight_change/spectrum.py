"""UpdateSpectrum: how many singular values each layer's update takes, over training.

The measurement of Biderman et al., 2024, arXiv:2405.09673, section on the ranks of updates, for any method and for full
fine-tuning alike: the smallest k whose first k singular values hold 90 % of the update's squared size.

Departs from the paper: stacked matrices, such as experts, count by the mean of their ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ll_weight_change.recorder import LayerRecorder, present_weight
from ll_weight_change.spectrum_records import FILENAME, FORMAT
from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.spectrum import dense_spectrum, factored_spectrum
from lora_lightning.errors import check


class UpdateSpectrum(LayerRecorder):
    """Writes the effective rank of each layer's update at chosen optimizer steps into a file that `analyse` draws.

    Works in any Lightning project. Where the model has adapters, their layers are measured: those whose update is a
    product exactly from its factors, others with the merged weight. Where it has none, every linear layer, convolution
    and embedding whose weight trains; a copy of the start weight stays on the CPU of the first process then.

    Args:
        at: optimizer steps to measure after; up to 1 a fraction of all steps, from 2 on a step number. The last step of
            the run is always measured.
        layers: regular expressions of which one must be found in a layer's path; None for all.
        fraction: of an update's squared size, that the counted singular values hold.
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
        fraction: float = 0.9,
        label: str | None = None,
        directory: str | Path | None = None,
        filename: str = FILENAME,
    ) -> None:
        super().__init__(at, layers, label, directory, filename)
        self.fraction = fraction
        check(0 < fraction <= 1, self, "fraction", "it must lie in (0, 1].")

    def header(self) -> dict[str, Any]:
        """Format and fraction."""
        return {"format": FORMAT, "fraction": self.fraction}

    def measure(self, layer: nn.Module, start: Callable[[], Tensor | None]) -> dict[str, Any] | None:
        """Effective rank, stable rank, size and largest singular value of the update, and the size of the matrix."""
        factors = _factors(layer)
        if factors is not None:
            A, B = factors
            return {**asdict(factored_spectrum(A, B, self.fraction)), "largest_rank": min(A.shape[-1], B.shape[-2])}
        exact = torch.float64  # a small update is rounded where it joins a large weight
        if isinstance(layer, AdaptedLayer) and layer.base_layer.device.type != "mps":
            weight = layer.applied_weight(exact)
        else:
            weight = present_weight(layer)
        began = start()
        if began is None:
            return None
        device = torch.device("cpu") if weight.device.type == "mps" else weight.device
        delta = weight.to(device, exact) - began.to(device, exact)
        return {**asdict(dense_spectrum(delta, self.fraction)), "largest_rank": min(delta.shape[-2:])}


def _factors(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(A, B) of the whole update of a layer whose base weight is still; None where it has no such form."""
    if not isinstance(layer, AdaptedLayer) or layer.base_layer.stored.requires_grad:
        return None
    found = [layer.low_rank(name) for name in layer.active]
    pairs = [pair for pair in found if pair is not None]
    if len(pairs) < len(found):
        return None
    exact = [(A.detach().cpu().double(), B.detach().cpu().double()) for A, B in pairs]
    return torch.cat([A for A, _ in exact], dim=-2), torch.cat([B for _, B in exact], dim=-1)
