"""What identifies a base model: names, shapes and all of its weights, whatever adapters are on it.

    architecture   the class
    names          sha256 of the names and plain shapes of parameters
    weights        sha256 of up to 64 entries a tensor, rounded to bfloat16: the same in any dtype, up to rounding
    dtypes         data types, as the tensors are stored
    sums           sha256 of the sums of every row and every column, taken over the tensors' bits: exact, in one dtype

Where both sides store the weights in the same data types, `sums` decides, and one changed entry is noticed. Elsewhere,
and for files of 0.1, which lack `sums`, `weights` does. Sums are of integers, modulo 2^64, so that order, device and
sharding do not matter. They are no protection against someone who wants two models to have the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lora_lightning.distributed import first_entry, local
from lora_lightning.errors import AdapterStateError
from lora_lightning.injection.records import records
from lora_lightning.models.anatomy import Anatomy, survey
from lora_lightning.models.new_tokens import without_rows
from lora_lightning.models.paths import plain, starting_with, unwrap
from lora_lightning.models.untied import untied

_SAMPLE = 64
_KEPT = "_lora_lightning_fingerprint"
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size in bytes."""
_CACHED = 2**20
"""Bytes that are summed at once on the CPU."""


def fingerprint(anatomy: Anatomy, without: Iterable[str] = ()) -> dict[str, Any]:
    """What identifies the base model, as plain data; see the module.

    A quantized layer has the name and shape of the plain one; `weights` and `sums` are None where there is one.

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
    tensors = list(found.values())
    return {
        **outline(anatomy, without),
        "weights": hashlib.sha256(_sample(tensors)).hexdigest() if readable else None,
        "dtypes": _dtypes(tensors) if readable else None,
        "sums": hashlib.sha256(_sums(tensors)).hexdigest() if readable else None,
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
    """Which of "architecture", "names" and "weights" two fingerprints differ in, as far as both state them."""
    found = [part for part in ("architecture", "names") if own[part] != theirs[part]]
    part = "sums" if _exact(own, theirs) else "weights"
    if None not in (own[part], theirs[part]) and own[part] != theirs[part]:
        found.append("weights")
    return found


def _exact(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether all weights can be compared, bit for bit."""
    return own.get("sums") is not None and theirs.get("sums") is not None and own["dtypes"] == theirs["dtypes"]


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


def _dtypes(tensors: Iterable[Tensor]) -> str:
    """Their data type; of a mixed model, all of them and a hash of which tensor has which."""
    each = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    names = " and ".join(sorted(set(each)))
    return names if len(set(each)) < 2 else f"{names} ({hashlib.sha256(' '.join(each).encode()).hexdigest()[:16]})"


def _sums(parameters: list[Tensor]) -> bytes:
    """Sums along rows and columns of each tensor's bits; every process gets those of the whole tensors."""
    parts = [_row_and_column_sums(parameter) for parameter in parameters]
    sharded = [i for i, parameter in enumerate(parameters) if isinstance(parameter, DTensor)]
    if sharded:  # sums of each row are there on one process, those of columns in part on all
        mesh = cast(DTensor, parameters[sharded[0]]).device_mesh
        total = torch.cat([parts[i].to(mesh.device_type) for i in sharded])
        torch.distributed.all_reduce(total, group=mesh.get_group())
        for i, part in zip(sharded, total.split([len(parts[i]) for i in sharded]), strict=True):
            parts[i] = part
    return b"".join(part.cpu().numpy().tobytes() for part in parts)


def _row_and_column_sums(parameter: Tensor) -> Tensor:
    """Of one tensor, as (rows, whatever a row holds): its row sums, then its column sums, modulo 2^64.

    Of a sharded parameter, zeros for rows that this process does not hold, and column sums of those it holds.
    """
    rows = parameter.shape[0] if parameter.dim() else 1
    words, first = _as_words(local(parameter).detach(), parameter), first_entry(parameter)
    of_rows, of_columns = _summed_both_ways(words)
    sums = of_rows.new_zeros(rows)
    start = first * rows // max(parameter.numel(), 1)
    sums[start : start + len(of_rows)] = of_rows
    return torch.cat([sums, of_columns])


def _summed_both_ways(words: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of each row and of each column of a matrix of integers."""
    if words.device.type != "cpu":
        return words.sum(1, dtype=torch.int64), words.sum(0, dtype=torch.int64)
    held = words.numpy()  # rows that fit into a cache are read from memory once; torch's sum of columns is slower
    of_rows = np.empty(held.shape[0], np.int64)
    of_columns = np.zeros(held.shape[1], np.int64)
    step = max(1, _CACHED // max(held.shape[1] * held.itemsize, 1))
    for start in range(0, len(held), step):
        some = held[start : start + step]
        of_rows[start : start + step] = some.sum(1, dtype=np.int64)
        of_columns += some.sum(0, dtype=np.int64)
    return torch.from_numpy(of_rows), torch.from_numpy(of_columns)


def _as_words(held: Tensor, parameter: Tensor) -> Tensor:
    """The bits of rows that are held as integers, (rows, words a row), as wide as a row's size in bytes allows."""
    entries = parameter.shape[1:].numel() if parameter.dim() else 1
    held = held.contiguous().reshape(-1, entries) if parameter.numel() else held.new_zeros(0, entries)
    size = parameter.element_size()
    if entries * size % 8 == 0 and held.storage_offset() * size % 8:
        held = held.clone()  # wide words must start at their own multiples
    return held.view(torch.int64 if entries * size % 8 == 0 else _WORDS[size])


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
    """Print that not all base weights were compared, and why: quantized, in another data type, or a file of 0.1."""
    if None in (own["weights"], theirs["weights"]):
        sides = {"here": own_format, "in training": their_format}
        stored = " and ".join(f"{'as ' + name if name else 'plain'} {where}" for where, name in sides.items())
        print(f"note: base weights were compared by name and shape only; they are stored {stored}")
    elif not _exact(own, theirs):
        why = "its file is of version 0.1"
        if theirs.get("dtypes"):
            why = f"they are {own['dtypes']} here and {theirs['dtypes']} in training"
        print(f"note: base weights were compared at {_SAMPLE} places a tensor only; {why}")


def _architecture(model: nn.Module) -> str:
    """The model's class; `fully_shard` puts one of its own on top."""
    cls = type(model)
    return (cls.__mro__[2] if FSDPModule in cls.__bases__ else cls).__name__
