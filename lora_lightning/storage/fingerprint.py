"""What identifies a base model: names, shapes and a sample of its weights, whatever adapters are on it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_lightning.distributed import first_entry, local
from lora_lightning.injection.records import records
from lora_lightning.models.anatomy import Anatomy, survey
from lora_lightning.models.new_tokens import without_rows
from lora_lightning.models.paths import plain, starting_with, unwrap

_SAMPLE = 64
_KEPT = "_lora_lightning_fingerprint"


def fingerprint(anatomy: Anatomy, without: Iterable[str] = ()) -> dict[str, Any]:
    """What identifies the base model: class, parameter names and shapes, and a hash of a fixed sample of weights.

    Sampled weights are rounded to bfloat16, so that a model loaded in half precision is recognised. A quantized layer
    has the name and shape of the plain one; `weights` is None where there is such a layer.

    Args:
        anatomy: of a plain module, or one with adapters (which do not count, even when merged).
        without: parameters that do not count, such as heads that train in full.

    Raises:
        AdapterStateError: a layer was merged with `keep_original=False`.
    """
    model = unwrap(anatomy.model)
    kept = model.__dict__.get(_KEPT)
    if kept is not None:
        return cast("dict[str, Any]", kept)
    quantized = {plain(base.weight_name(path)): base for path, base in anatomy.quantized.items()}
    found = _base_parameters(anatomy)
    skip = {without_rows(key, found) for key in map(plain, without)}
    found = {key: tensor for key, tensor in sorted(found.items()) if key not in skip}
    sampled = not quantized and all(tensor.is_floating_point() for tensor in found.values())
    names = hashlib.sha256()
    for key, parameter in found.items():
        shape = quantized[key].plain_shape if key in quantized else tuple(parameter.shape)
        names.update(f"{key}:{shape};".encode())
    return {
        "architecture": _architecture(model),
        "names": names.hexdigest(),
        "weights": hashlib.sha256(_sample(list(found.values()))).hexdigest() if sampled else None,
    }


def keep_fingerprint(model: nn.Module, without: Iterable[str] = ()) -> None:
    """Remember the fingerprint of a model whose parameters will not be readable any more; its base stays as it is."""
    model.__dict__[_KEPT] = fingerprint(survey(model), without)


def _sample(parameters: list[Tensor]) -> bytes:
    """Weights at fixed places, rounded to bfloat16."""
    parts = [_at_places(parameter).to(torch.bfloat16) for parameter in parameters]
    sharded = [i for i, parameter in enumerate(parameters) if isinstance(parameter, DTensor)]
    if sharded:  # each entry is there on one process, and zero on the others
        mesh = cast(DTensor, parameters[sharded[0]]).device_mesh
        total = torch.cat([parts[i].to(mesh.device_type) for i in sharded]).float()
        torch.distributed.all_reduce(total, group=mesh.get_group())
        for i, part in zip(sharded, total.split([len(parts[i]) for i in sharded]), strict=True):
            parts[i] = part.to(torch.bfloat16)
    return b"".join(part.cpu().view(torch.int16).numpy().tobytes() for part in parts)


def _at_places(parameter: Tensor) -> Tensor:
    """Up to 64 entries, evenly spread; of a sharded parameter zeros for those that this process does not hold."""
    count = min(_SAMPLE, parameter.numel())
    where = torch.arange(count, device=parameter.device) * (parameter.numel() - 1) // max(count - 1, 1)
    held, first = local(parameter).detach().reshape(-1), first_entry(parameter)
    if len(held) == parameter.numel():
        return held[where]
    here = (where >= first) & (where < first + len(held))
    values = held.new_zeros(count)
    values[here] = held[where[here] - first]
    return values


def _base_parameters(anatomy: Anatomy) -> dict[str, Tensor]:
    """Base parameters with the values and under the names they have without adapters."""
    listed = anatomy.parameters  # tied ones under their first name only
    above = [f"{path}." for path in anatomy.adapted]
    for record in records(anatomy.model).values():
        above += [f"{path}.adapters.".removeprefix(".") for path in record.linked]
    inside = starting_with(above, listed)
    found: dict[str, Tensor] = {plain(name): listed[name] for name in listed if name not in inside}
    for path in anatomy.extended:
        place, inside_it = plain(path), f"{plain(path)}.base."
        found = {
            f"{place}.{key.removeprefix(inside_it)}" if key.startswith(inside_it) else key: found[key] for key in found
        }
    for path, layer in anatomy.adapted.items():
        originals = layer.originals()
        for name, parameter in layer.base.named_parameters():
            made_by_merge = name == "bias" and name not in originals
            if f"{path}.base.{name}" in listed and not made_by_merge:
                key = layer.base_layer.weight_name(path) if name == "weight" else f"{path}.{name}"
                found[plain(key)] = originals.get(name, parameter)
    return found


def say_unsampled(
    own: Mapping[str, Any], theirs: Mapping[str, Any], own_format: str | None, their_format: str | None
) -> None:
    """Print that base weights were not compared, where a side has them quantized, and in which."""
    if None in (own["weights"], theirs["weights"]):
        sides = {"here": own_format, "in training": their_format}
        stored = " and ".join(f"{'as ' + name if name else 'plain'} {where}" for where, name in sides.items())
        print(f"note: base weights were compared by name and shape only; they are stored {stored}")


def _architecture(model: nn.Module) -> str:
    """The model's class; `fully_shard` puts one of its own on top."""
    cls = type(model)
    return (cls.__mro__[2] if FSDPModule in cls.__bases__ else cls).__name__
