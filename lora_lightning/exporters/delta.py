"""Writing the dense update of every adapted layer: what to add to the base model, whatever the method.

delta.safetensors    `<layer>.weight`, `<layer>.bias`: merged minus original, in the layer's own layout, float32;
                     an expert parameter's under its own name; fully trained parameters as they are, listed as
                     "whole" in the metadata; the output layer of an untied model as "untied"
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_lightning.errors import ExportError
from lora_lightning.exporters.report import Written
from lora_lightning.exporters.source import Source, check_finite
from lora_lightning.models.untied import untied

FILE = "delta.safetensors"


def write(source: Source, folder: Path, rank: int | None, verify: bool) -> Written:  # noqa: ARG001 - every format's signature
    """Write the updates into `folder`.

    Args:
        source: the adapter.
        folder: an empty folder.
        rank: no rank limits a dense update.
        verify: read the file back and compare every number.

    Raises:
        ExportError: an input-routed method, or numbers that are not finite.
    """
    check(source)
    tensors = {key: value for path in source.layers for key, value in _layer(source, path).items()}
    full = list(source.trained)
    for name in full:
        path, _, leaf = name.rpartition(".")
        tensors[name] = source.modules[path].get_parameter(leaf).detach().cpu().clone()
    check_finite("the update", tensors)
    metadata, notes = {"format": "lora_lightning delta", "whole": json.dumps(full)}, []
    apart = untied(source.anatomy.model)
    if apart is not None:
        metadata["untied"] = apart.weight.removeprefix(source.prefix)
        notes.append(
            f"{metadata['untied']} is a weight of its own, a copy of the embedding's that the update is added to; in a "
            "model that shares it the update would change both"
        )
    save_file(tensors, folder / FILE, metadata)
    if verify:
        _compare(folder, tensors)
    difference = 0.0 if verify else None
    return Written(kind="dense update", layers=len(source.layers), difference=difference, notes=tuple(notes))


def check(source: Source) -> None:
    """Raise `ExportError` for what `write` will refuse whatever values are trained."""
    source.refuse_below()
    for path, layer in source.layers.items():
        source.check_fixed(path)
        if layer.tied_to:
            raise ExportError(
                f"{path} shares its weight with {', '.join(layer.tied_to)}, and an update that is added to it changes "
                'both. Use format="peft", which keeps the update apart, or train with untie=True (model.untie).'
            )


def _layer(source: Source, path: str) -> dict[str, Tensor]:
    """What the adapter adds to one layer, in the layer's own layout."""
    source.check_fixed(path)
    layer, adapter = source.layers[path], source.adapter(path)
    base = layer.base_layer
    original = layer.pretrained_weight(torch.float64)
    delta = layer.merged_weight(source.name, torch.float64) - original
    found = {base.weight_name(path): base._store(delta.float().cpu()).contiguous()}
    old = layer.originals().get("bias")
    new = adapter.merged_bias(None if old is None else old.to(base.device).double())
    if new is not None:
        change = new.detach().cpu() if old is None else new.detach().cpu() - old.cpu().double()
        if old is None or change.any():
            found[f"{path}.bias"] = change.float()
    return found


def _compare(folder: Path, tensors: dict[str, Tensor]) -> None:
    with safe_open(folder / FILE, framework="pt") as file:
        for key, tensor in tensors.items():
            if not torch.equal(file.get_tensor(key), tensor):
                raise ExportError(f"{key} does not read back bit for bit.")
