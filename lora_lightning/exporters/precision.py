"""The data type and the quantization of a merged model: merged in float32 first, rounded once, then quantized."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import ExportError, SettingsError
from lora_lightning.exporters.companions import any_generation_config
from lora_lightning.exporters.source import Source
from lora_lightning.models.anatomy import survey
from lora_lightning.models.heads import output_embeddings
from lora_lightning.models.quantized_loading import Loading, check_format, quantization_config

_CONFIG = "config.json"
_HALF_STEP = 0.16
"""Half of the widest gap between two of nf4's sixteen numbers, in parts of a block's largest one, rounded up."""


def check_precision(source: Source) -> None:
    """Raise `ExportError` where a data type is asked for that the model was rounded away from, or a package lacks."""
    if source.quantize is not None:
        try:
            check_format(source.quantize, where="--quantize")
        except SettingsError as error:
            raise ExportError(str(error)) from error
    if source.dtype is None:
        return
    wanted: torch.dtype = getattr(torch, source.dtype)
    for path, layer in source.layers.items():
        own = layer.base_layer.dtype
        if own not in (torch.float32, torch.float64, wanted):
            raise ExportError(
                f"{path} is {str(own).removeprefix('torch.')}, so merging rounds to it, not to {source.dtype}. Load "
                "the base model in float32 first, as the command line does."
            )


def in_dtype(state: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Tensors by name, those of floating point in a data type; what is one tensor stays one."""
    if dtype is None:
        return dict(state)
    cast = {
        id(t): t.detach().to(getattr(torch, dtype)) if t.is_floating_point() else t.detach() for t in state.values()
    }
    return {name: cast[id(tensor)] for name, tensor in state.items()}


def state_dtype(folder: Path, dtype: str) -> None:
    """Write the data type into the configuration of a model's folder, and into those inside it."""
    path = folder / _CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        if part is content or "dtype" in part:
            part["dtype"] = dtype
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def quantize(
    model_class: Any, folder: Path, format: str, trained: Iterable[str], verify: bool
) -> tuple[float | None, str]:
    """Quantize the model in a folder, in its place, by transformers and bitsandbytes.

    Heads, the output layer and what trained in full stay as they are.

    Args:
        model_class: class of the model.
        folder: holds the plain model, and then the quantized one.
        format: see `quantized_loading.FORMATS`.
        trained: parameters that trained in full.
        verify: load the result again and compare each weight with the plain one.

    Returns:
        The largest difference of a weight, and a line about it.

    Raises:
        ExportError: a weight differs by more than the format rounds, or a plain tensor at all.
    """
    plain = model_class.from_pretrained(folder)
    head = output_embeddings(plain)
    keep = {name.rpartition(".")[0] for name in trained}
    keep |= {path for path, module in plain.named_modules() if module is head}
    how = quantization_config(Loading(format, compute=str(plain.dtype).removeprefix("torch.")), sorted(keep))
    made = model_class.from_pretrained(folder, quantization_config=how, dtype=plain.dtype)
    layers = survey(made).quantized
    if not layers:
        raise ExportError(f"--quantize {format} found no layer to quantize in {model_class.__name__}.")
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        with any_generation_config(made, Path(place)):
            made.save_pretrained(place)
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        for path in Path(place).iterdir():
            shutil.move(path, folder / path.name)
    note = f"{len(layers)} layers are {format}; loading them needs bitsandbytes and accelerate"
    if not verify:
        return None, note
    difference, relative = _compared(model_class.from_pretrained(folder, dtype=plain.dtype), plain)
    return difference, f"{note}; their weights differ by {relative:.1%} of their size in the mean"


@torch.no_grad()
def _compared(model: Any, plain: Any) -> tuple[float, float]:
    """Largest difference of a weight, and the relative one in norms over all quantized weights."""
    layers, own = survey(model).quantized, dict(plain.named_parameters())
    largest, off, size = 0.0, 0.0, 0.0
    for path, layer in layers.items():
        wanted = own.pop(f"{path}.weight").float()
        change = layer.weight(torch.float32).cpu() - wanted
        if not float(change.abs().max()) <= _HALF_STEP * float(wanted.abs().max()) + 1e-7:
            raise ExportError(f"{path} does not read back as it was, up to quantization.")
        largest = max(largest, float(change.abs().max()))
        off, size = off + float(change.square().sum()), size + float(wanted.square().sum())
    there = dict(model.named_parameters())
    for name, value in own.items():
        if not torch.equal(there[name].cpu(), value):
            raise ExportError(f"{name} does not read back bit for bit.")
    return largest, (off / max(size, 1e-30)) ** 0.5
