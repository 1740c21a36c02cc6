"""What identifies a base model: names, shapes and all of its weights, whatever adapters are on it.

    architecture   the class
    names          sha256 of the names and plain shapes of parameters
    weights        sha256 of up to 64 entries a tensor, rounded to bfloat16: the same in any dtype, up to rounding
    dtypes         data types, as the tensors are stored; of quantized ones the format, and what had quantized them
    content        sha256 of the XXH3 of every row's bytes, in order: exact, where weights are stored alike
    statistics     data types, and sha256 of the bytes, of running statistics that stay as they are; null without any
    buffers        the same of the other buffers of transformers' own modules: bounds, corrections of routers, scales

Where both sides store the weights alike, `content` decides, and whatever differs is noticed. Elsewhere, and for older
files, which lack it, `weights` does; of quantized weights, names and shapes. Rows are hashed one by one, so that it
does not matter how they are sharded. XXH3 does not protect from someone who wants two models to have the same content.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from xxhash import xxh3_64_intdigest

from lora_lightning.adapters.layers.quantized import QuantizedBase, flattened
from lora_lightning.distributed import first_entry, local
from lora_lightning.errors import AdapterStateError
from lora_lightning.injection.records import records
from lora_lightning.injection.statistics import layers_with_statistics
from lora_lightning.models.anatomy import Anatomy, survey
from lora_lightning.models.new_tokens import buffers_before, without_rows
from lora_lightning.models.paths import join, plain, starting_with, unwrap
from lora_lightning.models.untied import untied

_SAMPLE = 64
_KEPT = "_lora_lightning_fingerprint"
_WIDE = 1024
"""Bytes of a row from which on it has a hash of its own; narrower rows are taken as they are."""
_AT_ONCE = 2**26
"""Bytes that are brought from a device at once."""


def fingerprint(anatomy: Anatomy, without: Iterable[str] = ()) -> dict[str, Any]:
    """What identifies the base model, as plain data; see the module.

    A quantized layer has the name and shape of the plain one; `weights` is None where there is one, and `content` too
    where it is sharded.

    Args:
        anatomy: of a plain module, or one with adapters (which do not count, even when merged).
        without: parameters that do not count, such as heads that train in full.

    Raises:
        AdapterStateError: a layer was merged with `keep_original=False`, or a weight has no value.
    """
    kept = unwrap(anatomy.model).__dict__.get(_KEPT)
    if kept is not None:
        return cast("dict[str, Any]", kept)
    found = counted(anatomy, without)
    readable = not anatomy.quantized and all(tensor.is_floating_point() for tensor in found.values())
    for key, parameter in found.items():
        if parameter.is_meta:
            raise AdapterStateError(
                f"{key} is on the meta device, without a value, so it cannot be compared with what an adapter was "
                "trained on. Load the base model's weights first: from_pretrained without a meta device, or "
                "model.to_empty(device=...) and load_state_dict."
            )
    quantized = {plain(base.weight_name(path)): base for path, base in anatomy.quantized.items()}
    tensors, kinds = list(found.values()), []
    stored: list[Tensor] = []
    for key, tensor in found.items():
        parts = quantized[key].parts if key in quantized else flattened(tensor)
        kinds.append(_quantized_by(quantized[key]) if key in quantized else str(tensor.dtype).removeprefix("torch."))
        stored += parts
    whole = not any(isinstance(found[key], DTensor) for key in quantized.keys() & found.keys())
    return {
        **outline(anatomy, without),
        "weights": hashlib.sha256(_sample(tensors)).hexdigest() if readable else None,
        "dtypes": _dtypes(kinds),
        "content": hashlib.sha256(_content(stored)).hexdigest() if whole else None,
        "statistics": _of_buffers(still_statistics(anatomy, without)),
        "buffers": _of_buffers(still_buffers(anatomy, without)),
    }


def outline(anatomy: Anatomy, without: Iterable[str] = ()) -> dict[str, str]:
    """The part of a fingerprint that needs no values: class, and a hash of names and shapes."""
    quantized = {plain(base.weight_name(path)): base for path, base in anatomy.quantized.items()}
    names = hashlib.sha256()
    for key, parameter in counted(anatomy, without).items():
        shape = quantized[key].plain_shape if key in quantized else tuple(parameter.shape)
        names.update(f"{key}:{shape};".encode())
    return {"architecture": _architecture(unwrap(anatomy.model)), "names": names.hexdigest()}


def differences(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Which of "architecture", "names", "weights", "statistics", "buffers" two fingerprints differ in.

    What one of them does not state is not compared, nor are statistics and buffers of other data types.
    """
    found = [part for part in ("architecture", "names") if own[part] != theirs[part]]
    part = "content" if _exact(own, theirs) else "weights"
    if None not in (own[part], theirs[part]) and own[part] != theirs[part]:
        found.append("weights")
    for part in ("statistics", "buffers"):
        here, there = own.get(part), theirs.get(part)
        if here and there and here["dtypes"] == there["dtypes"] and here != there:
            found.append(part)
    return found


def _exact(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether all weights can be compared, bit for bit."""
    there = own.get("content") is not None and theirs.get("content") is not None
    return there and own["dtypes"] == theirs["dtypes"]


def still_statistics(anatomy: Anatomy, without: Iterable[str] = ()) -> dict[str, Tensor]:
    """Running statistics by name, but for those of layers with one of the parameters `without`, which train along."""
    training = {plain(name).rpartition(".")[0] for name in without}
    return {
        f"{plain(path)}.{name}": buffer
        for path, layer in layers_with_statistics(anatomy).items()
        if plain(path) not in training
        for name, buffer in layer._buffers.items()
        if buffer is not None and name.startswith("running_")
    }


def still_buffers(anatomy: Anatomy, without: Iterable[str] = ()) -> dict[str, Tensor]:
    """Persistent buffers of modules that transformers defines, which never move, by name; no running statistics.

    Those at or below the owner of a parameter `without` train along, and are saved with it. A buffer that new tokens
    have made longer is the one from before.
    """
    training = {f"{plain(name).rpartition('.')[0]}." for name in without if "." in plain(name)}
    statistics = still_statistics(anatomy)
    before = buffers_before(unwrap(anatomy.model))
    found: dict[str, Tensor] = {}
    for path, module in anatomy.modules.items():
        here = plain(path)
        if type(module).__module__.startswith("transformers.") and not f"{here}.".startswith(tuple(training)):
            unsaved = module._non_persistent_buffers_set
            found |= {join(here, n): b for n, b in module._buffers.items() if b is not None and n not in unsaved}
    return {name: before.get(name, buffer) for name, buffer in found.items() if name not in statistics}


def _of_buffers(given: Mapping[str, Tensor]) -> dict[str, str] | None:
    found = dict(sorted(given.items()))
    if not found or any(buffer.is_meta for buffer in found.values()):
        return None
    digest = hashlib.sha256()
    for name, buffer in found.items():
        digest.update(f"{name}:".encode() + _bytes(local(buffer).detach().reshape(-1)).numpy().tobytes())
    return {"dtypes": " ".join(str(b.dtype) for b in found.values()), "sha256": digest.hexdigest()}


def counted(anatomy: Anatomy, without: Iterable[str]) -> dict[str, Tensor]:
    """The base weights that a fingerprint counts, by the names they have in the plain model."""
    found = dict(sorted(_base_parameters(anatomy).items()))
    for name in without:
        found.pop(without_rows(plain(name), found), None)
    return found


def keep_fingerprint(model: nn.Module, without: Iterable[str] = ()) -> None:
    """Remember the fingerprint of a model whose parameters will not be readable any more; its base stays as it is."""
    model.__dict__[_KEPT] = fingerprint(survey(model), without)


def has_kept_fingerprint(model: nn.Module) -> bool:
    """Whether `keep_fingerprint` has been called for a model."""
    return _KEPT in unwrap(model).__dict__


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


def _dtypes(each: list[str]) -> str:
    """Their data type; of a mixed model, all of them and a hash of which tensor has which."""
    names = " and ".join(sorted(set(each)))
    return names if len(set(each)) < 2 else f"{names} ({hashlib.sha256(' '.join(each).encode()).hexdigest()[:16]})"


def _quantized_by(base: QuantizedBase) -> str:
    """The format, and what rounds in a way of its own: the package and its version, and the device."""
    package = type(base.stored.data).__module__.partition(".")[0]
    if package == "torch":
        package = type(base.module).__module__.partition(".")[0]
    with contextlib.suppress(PackageNotFoundError):  # a layer of a project's own
        package = f"{package} {version(package)}"
    device = base.stored.device
    return (
        f"{base.format} of {package} on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"
    )


def _content(parameters: list[Tensor]) -> bytes:
    """Hashes of rows, or narrow rows themselves; every process gets those of the whole tensors."""
    parts = [_rows(parameter) for parameter in parameters]
    sharded = [i for i, parameter in enumerate(parameters) if isinstance(parameter, DTensor)]
    if sharded:  # what stands for a row is there on one process, and zero on the others
        mesh = cast(DTensor, parameters[sharded[0]]).device_mesh
        total = torch.cat([parts[i] for i in sharded]).to(mesh.device_type)
        torch.distributed.all_reduce(total, group=mesh.get_group())
        for i, part in zip(sharded, total.split([len(parts[i]) for i in sharded]), strict=True):
            parts[i] = part
    shapes = [f"{tuple(parameter.shape)};".encode() for parameter in parameters]
    return b"".join(b for part, shape in zip(parts, shapes, strict=True) for b in (shape, part.cpu().numpy().tobytes()))


def _rows(parameter: Tensor) -> Tensor:
    """What stands for the rows of a tensor, in integers of 64 bits; zeros for rows that another process holds."""
    width = parameter.shape[1:].numel() if parameter.dim() else 1
    held, first = local(parameter).detach().reshape(-1), first_entry(parameter)
    size, entries = parameter.element_size(), parameter.numel()
    if width * size < _WIDE:
        own = torch.zeros(-(-entries * size // 8) * 8, dtype=torch.uint8)
        own[first * size : (first + len(held)) * size] = _bytes(held)
        return own.view(torch.int64)
    hashes = np.zeros(entries // width, np.uint64)
    start, step = first // width, max(1, _AT_ONCE // (width * size))
    for row in range(0, len(held) // width, step):
        some = _bytes(held[row * width : (row + step) * width]).numpy().reshape(-1, width * size)
        hashes[start + row : start + row + len(some)] = [xxh3_64_intdigest(each.data) for each in some]
    return torch.from_numpy(hashes.view(np.int64))


def _bytes(held: Tensor) -> Tensor:
    """The bytes of a flat tensor, on the CPU."""
    return held.cpu().contiguous().view(torch.uint8)


def _base_parameters(anatomy: Anatomy) -> dict[str, Tensor]:
    """Base parameters with the values and under the names they have without adapters and rows of new tokens."""
    listed = anatomy.parameters  # tied ones under their first name only
    above = [f"{path}." for path in anatomy.adapted]
    for record in records(anatomy.model).values():
        above += [f"{path}.adapters.".removeprefix(".") for path in record.linked]
    inside = starting_with(above, listed)
    found: dict[str, Tensor] = {plain(name): listed[name] for name in listed if name not in inside}
    for path in anatomy.extended:
        for rows in ("new_rows", "token_rows"):  # they stand in the place of rows that count
            found.pop(f"{plain(path)}.{rows}", None)
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
    apart = untied(anatomy.model)
    if apart is not None:  # a copy of one that counts
        found.pop(apart.weight, None)
    return found


def say_how_compared(
    own: Mapping[str, Any], theirs: Mapping[str, Any], own_format: str | None, their_format: str | None
) -> None:
    """Print that not all base weights were compared, and why: quantized, in another data type, or an older file."""
    if _exact(own, theirs):
        return
    if None in (own["weights"], theirs["weights"]):
        here, there = own_format, their_format
        if own_format == their_format and theirs.get("content") and own["content"]:
            here, there = own["dtypes"], theirs["dtypes"]
        sides = {"here": here, "in training": there}
        stored = " and ".join(f"{'as ' + name if name else 'plain'} {where}" for where, name in sides.items())
        print(f"note: base weights were compared by name and shape only; they are stored {stored}")
        return
    why = "its file is of an older version"
    if theirs.get("content"):
        why = f"they are {own['dtypes']} here and {theirs['dtypes']} in training"
    print(f"note: base weights were compared at {_SAMPLE} places a tensor only; {why}")


def _architecture(model: nn.Module) -> str:
    """The model's class; `fully_shard` puts one of its own on top."""
    cls = type(model)
    return (cls.__mro__[2] if FSDPModule in cls.__bases__ else cls).__name__
