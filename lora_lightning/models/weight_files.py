"""Single weights from a model's safetensors files, without building the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lora_lightning.errors import ModelError, did_you_mean
from lora_lightning.models.pretrained import resolve

FAR = 0.7
"""Relative distance above which a weight is not what was quantized; 2 bits stay below."""


class WeightFiles:
    """The tensors of a folder's safetensors files, read one at a time.

    Args:
        folder: with the files, see `pretrained.resolve`.
        field: the setting that names it, for messages.

    Raises:
        ModelError: no such folder, or one without safetensors files.
    """

    def __init__(self, folder: str, field: str) -> None:
        self.folder, self.field = Path(resolve(folder, field, needs=None)), field
        self.files: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []:
            with safe_open(path, framework="pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)
        if not self.files:
            raise ModelError(f'{field} is "{folder}"; it must be a folder with safetensors files, and has none.')

    def weight(self, path: str, shape: torch.Size) -> Tensor:
        """The weight of the layer at `path`, on the CPU, as it is stored (a transposed one is turned).

        The name of the backbone, which files may lack or have in front, does not count.

        Raises:
            ModelError: no file has it, or one of another shape.
        """
        name = next((name for name in self._names(path) if name in self.files), None)
        if name is None:
            raise ModelError(
                f'{self.field}: no file in "{self.folder}" has the weight of {path}.'
                f"{did_you_mean(f'{path}.weight', self.files)}"
            )
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if tensor.shape != shape and tensor.mT.shape == shape:
            tensor = tensor.mT
        if tensor.shape != shape:
            raise ModelError(f"{self.field}: {name} is {tuple(tensor.shape)}, and the layer's weight {tuple(shape)}.")
        return tensor

    def lost(self, path: str, quantized: Tensor) -> Tensor:
        """What a quantized weight lacks of the one in the files, float64, on its device.

        Raises:
            ModelError: see `weight`; or another model was quantized.
        """
        quantized = quantized.double()
        lost = self.weight(path, quantized.shape).to(quantized.device).double() - quantized
        far = float(lost.norm() / quantized.norm().clamp_min(1e-30))
        if far > FAR:
            raise ModelError(
                f'{self.field} is "{self.folder}"; its {path} differs from the quantized weight by {far:.2f} of that '
                "one's length, so another model was quantized. Give the folder of the one that was."
            )
        return lost

    def _names(self, path: str) -> Iterator[str]:
        name = f"{path}.weight"
        yield from (name, name.partition(".")[2])
        yield from (other for other in self.files if other.partition(".")[2] == name)
