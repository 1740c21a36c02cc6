"""What identifies a base model: names, shapes and a sample of its weights, whatever adapters are on it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_lightning.injection import iter_adapters
from lora_lightning.paths import plain, starting_with, unwrap
from lora_lightning.vocabulary import grown_layers

_SAMPLE = 64


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> dict[str, Any]:
    """What identifies the base model: class, parameter names and shapes, and a hash of a fixed sample of weights.

    Sampled weights are rounded to bfloat16, so that a model loaded in half precision is recognised. `weights` is None
    where a base stores something else than floating-point numbers.

    Args:
        model: a plain module, or one with adapters (which do not count, even when merged).
        without: parameters that do not count, such as heads that train in full.

    Raises:
        AdapterStateError: a layer was merged with `keep_original=False`.
    """
    skip = {plain(name) for name in without}
    names, sample, sampled = hashlib.sha256(), hashlib.sha256(), True
    for key, parameter in sorted(_base_parameters(model).items()):
        if key in skip:
            continue
        names.update(f"{key}:{tuple(parameter.shape)};".encode())
        values = whole(parameter).reshape(-1)
        if not values.is_floating_point():
            sampled = False
            continue
        n = min(_SAMPLE, values.numel())
        where = torch.arange(n, device=values.device) * (values.numel() - 1) // max(n - 1, 1)
        sample.update(values[where].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return {
        "architecture": _architecture(unwrap(model)),
        "names": names.hexdigest(),
        "weights": sample.hexdigest() if sampled else None,
    }


def _base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Base parameters with the values and under the names they have without adapters."""
    listed = dict(model.named_parameters())  # tied ones under their first name only
    layers = dict(iter_adapters(model))
    inside = starting_with((f"{path}." for path in layers), listed)
    grown = {f"{path}.base.weight": f"{path}.weight" for path in grown_layers(model)}
    found: dict[str, Tensor] = {plain(grown.get(name, name)): listed[name] for name in listed if name not in inside}
    for path, layer in layers.items():
        originals = layer.originals()
        for name, parameter in layer.base.named_parameters():
            made_by_merge = name == "bias" and name not in originals
            if f"{path}.base.{name}" in listed and not made_by_merge:
                key = layer.accessor.weight_name(path) if name == "weight" else f"{path}.{name}"
                found[plain(key)] = originals.get(name, parameter)
    return found


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; for a sharded one every process has to take part."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _architecture(model: nn.Module) -> str:
    """The model's class; `fully_shard` puts one of its own on top."""
    cls = type(model)
    return (cls.__mro__[2] if FSDPModule in cls.__bases__ else cls).__name__
