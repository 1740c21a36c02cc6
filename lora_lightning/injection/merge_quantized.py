"""Merging quantized layers: plain copies take their place, and the change of their outputs is measured."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.layers.quantized import QuantizedBase
from lora_lightning.seeds import generator

INPUTS = 64


@dataclass
class Dequantized:
    """Quantized layers in whose place plain ones stand.

    Each is compared with what it computed before on `INPUTS` random normal inputs, equal for every merge.
    """

    layers: int = 0
    formats: set[str] = field(default_factory=set)
    dtypes: set[str] = field(default_factory=set)
    largest: float = 0.0
    """Largest absolute difference of an output."""
    relative: float = 0.0
    """Largest |difference| / |output| of a layer, in norms over its outputs."""
    worst: str = ""
    """Path of that layer."""

    def merge(self, path: str, layer: AdaptedLayer, keep_original: bool = True) -> None:
        """Merge the active adapters of a layer; one that is quantized is measured."""
        base = layer.base_layer
        if layer.merged or not layer.active or not isinstance(base, QuantizedBase):
            layer.merge(keep_original)
            return
        draws = torch.randn(INPUTS, base.d_in, device="cpu", generator=generator(0, "merge", 0, path))
        x = draws.to(base.device, base.dtype)
        before = _output(layer, x)
        layer.merge(keep_original)
        self._add(path, base, before, _output(layer, x))

    def _add(self, path: str, base: QuantizedBase, before: Tensor, after: Tensor) -> None:
        difference, size = (after.double() - before.double()), before.double().norm()
        relative = float(difference.norm() / size.clamp_min(1e-30))
        self.layers += 1
        self.formats.add(base.format)
        self.dtypes.add(str(base.dtype).removeprefix("torch."))
        self.largest = max(self.largest, float(difference.abs().max()))
        if relative >= self.relative:
            self.relative, self.worst = relative, path

    def __str__(self) -> str:
        return (
            f"merged into dequantized copies: {self.layers} layers ({', '.join(sorted(self.formats))}) in "
            f"{', '.join(sorted(self.dtypes))}; outputs differ from the unmerged ones by {self.largest:.2g} at most, "
            f"{self.relative:.2g} in relation to their size ({self.worst})"
        )


@torch.no_grad()
def _output(layer: AdaptedLayer, x: Tensor) -> Tensor:
    """What a layer computes in evaluation."""
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()
    try:
        return layer(x)  # type: ignore[no-any-return]
    finally:
        for module, training in modes:
            module.training = training
