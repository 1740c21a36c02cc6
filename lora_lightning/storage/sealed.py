"""The content of adapter.safetensors: tensors, the description, and digests of these and of what belongs with them.

    metadata   format    "lora_lightning"
               adapter   the description, JSON
               digests   JSON: {"adapter": sha256, "tensors": {name: sha256}, "files": {name in the folder: sha256}}

The same content always gives the same bytes. A tensor's digest is of its type, shape and bytes. Files of 0.1 have no
digests; schema 2 needs them, and schema 3 states adapters below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lora_lightning.errors import AdapterFileError

FORMAT = "lora_lightning"
SCHEMA = 2
"""Version of the description; 1 has no digests."""
STACKED = 3
"""Version of one that states adapters below, which a reader that does not know of them has to refuse."""


@dataclass(frozen=True)
class Sealed:
    """What a file holds, found to be what was saved."""

    tensors: dict[str, Tensor]
    description: dict[str, Any]
    files: dict[str, str] | None
    """sha256 of each file that belongs with it, by its name in the folder; None in a file of 0.1."""


def digest(content: bytes) -> str:
    """The sha256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """The sha256 of a tensor's type, shape and bytes."""
    held = tensor.detach().to("cpu").contiguous()
    found = hashlib.sha256(f"{str(held.dtype).removeprefix('torch.')}{list(held.shape)}".encode())
    found.update(held.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def seal(tensors: Mapping[str, Tensor], description: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """The bytes of adapter.safetensors.

    Args:
        tensors: contiguous, on the CPU.
        description: plain data.
        files: what belongs with it, by name in the folder.

    Raises:
        AdapterFileError: a number is NaN or infinite.
    """
    check_finite(tensors, description)
    text = json.dumps(description)
    digests = {
        "adapter": digest(text.encode()),
        "tensors": {key: tensor_digest(tensor) for key, tensor in sorted(tensors.items())},
        "files": {name: digest(content) for name, content in sorted(files.items())},
    }
    content = to_safetensors(dict(tensors), {"format": FORMAT, "adapter": text, "digests": json.dumps(digests)})
    return _in_order(content)


def _in_order(content: bytes) -> bytes:
    """The same file with its header's keys in order: safetensors writes those of the metadata in a random one."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = dict(sorted(header.pop("__metadata__").items()))
    entries = sorted(header.items(), key=lambda entry: (entry[1]["data_offsets"], entry[0]))
    text = json.dumps({"__metadata__": metadata, **dict(entries)}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def unseal(content: bytes) -> Sealed:
    """What the bytes of adapter.safetensors hold, if they are what was saved.

    Raises:
        AdapterFileError: another program's file; or what is damaged, naming the tensor.
        Exception: of any kind, where the content is no such file at all.
    """
    tensors = tensors_of(content)  # refuses what is cut off, too long or overlapping
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise AdapterFileError("was not written by this library: its metadata lacks the format.")
    unknown = sorted(metadata.keys() - {"format", "adapter", "digests"})
    if unknown:
        raise ValueError(f"its metadata has the unknown entry {unknown[0]!r}")
    description = json.loads(metadata["adapter"])
    schema = description["schema_version"]
    if type(schema) is not int or schema < 1:
        raise ValueError(f"schema_version is {schema!r}")
    if schema > STACKED:
        raise AdapterFileError(f"has schema version {schema}; this library reads up to {STACKED}. Update it.")
    files = None
    if schema > 1 or "digests" in metadata:
        files = _check_digests(json.loads(metadata["digests"]), metadata["adapter"], tensors)
    check_finite(tensors, description)
    return Sealed(tensors, description, files)


def _check_digests(digests: dict[str, Any], text: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Compare what is there with its digests, and give those of other files."""
    if digests["adapter"] != digest(text.encode()):
        raise ValueError("the description in it is not what was saved")
    stated = digests["tensors"]
    for key in sorted(stated.keys() ^ tensors.keys()):
        raise ValueError(f"tensor {key} {'is missing' if key in stated else 'was not saved with the others'}")
    for key, tensor in sorted(tensors.items()):
        if stated[key] != tensor_digest(tensor):
            raise ValueError(f"tensor {key} is not what was saved")
    return {str(name): str(value) for name, value in digests["files"].items()}


def check_finite(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Raise `AdapterFileError` naming a tensor with a value that is NaN or infinite.

    A buffer of a head may be infinite, as a mask or the bound of a range is.
    """
    trained = description.get("trained") or []
    heads = {f"{parameter.rpartition('.')[0]}." for parameter in trained if "." in parameter}
    for key, tensor in tensors.items():
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            values = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit types know no isfinite
            adapter = ".adapters." in f".{key}" or ".shifts." in f".{key}"
            buffer = not adapter and key not in trained and key.startswith(tuple(heads))
            if not bool((~torch.isnan(values) if buffer else torch.isfinite(values)).all()):
                raise AdapterFileError(f"holds a value that is NaN or infinite in {key}; no adapter works with it.")
