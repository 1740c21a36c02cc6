"""The adapter folder: `save_adapter`, and what is read of a folder without a model (`load.py` loads it).

    adapter.safetensors    tensors of adapters and fully trained heads; description in its metadata; the commit point
    adapter.json           the description again, for people
    tokenizer/             where new tokens were added: the tokenizer that knows them

Tensor names are those of the model: `<path>.adapters.<name>.<tensor>`, heads under their own names, without what
torch.compile, FSDP1 or activation checkpointing put into a path.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from lora_lightning.distributed import gather
from lora_lightning.errors import AdapterFileError, AdapterStateError, did_you_mean, nearest
from lora_lightning.injection.heads import heads_of
from lora_lightning.injection.records import injected_root, records
from lora_lightning.models.anatomy import survey
from lora_lightning.models.new_tokens import Vocabulary, vocabulary
from lora_lightning.models.paths import plain
from lora_lightning.storage.atomic import as_json, write_all
from lora_lightning.storage.description import SCHEMA, describe_adapter, described_formats
from lora_lightning.storage.state import surveyed_state

FILE = "adapter.safetensors"
DESCRIPTION = "adapter.json"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Stored:
    """An adapter folder, read."""

    name: str
    method: str
    settings: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    """Layer path to the settings in which it differs."""
    trained: tuple[str, ...]
    seed: int
    fingerprint: dict[str, Any]
    versions: dict[str, str]
    base: str | None
    tensors: dict[str, Tensor]
    vocabulary: Vocabulary | None = None
    """New tokens that its rows belong to."""
    quantization: str | None = None
    """Formats that the base weights were stored in, joined."""
    plan: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """What the method itself had set for some layers."""
    linked: tuple[str, ...] = ()
    """Paths of modules that own what layers share."""


def save_adapter(model: nn.Module, directory: str | Path, name: str = "default") -> Path:
    """Write one adapter as a folder, atomically, after a check that it reads back as it is.

    Of a sharded model every process calls this, and the first one writes.

    Args:
        model: a model with adapters.
        directory: the folder; an adapter that is there already is replaced only when the new one is whole.
        name: which adapter.

    Returns:
        The folder.

    Raises:
        AdapterStateError: there is no such adapter, or it was merged with `keep_original=False`.
        AdapterFileError: the folder cannot be written; what was there is intact.
    """
    root = injected_root(model)
    if name not in records(root):
        raise AdapterStateError(
            f'no adapter "{name}".{did_you_mean(name, records(root))} Installed: {", ".join(records(root))}.'
        )
    anatomy = survey(root)
    with heads_of(root, [name]):
        state = surveyed_state(anatomy, [name])
        full = gather(list(state.values()))
        tensors = {plain(k): t.to("cpu", copy=True).contiguous() for k, t in zip(state, full, strict=True)}
        description = describe_adapter(anatomy, name)
    folder = Path(directory)
    if anatomy.sharded and torch.distributed.get_rank() > 0:
        return folder
    content = to_bytes(tensors, {"format": "lora_lightning", "adapter": json.dumps(description)})
    _check_readable(content, tensors)

    added = vocabulary(root)
    tokenizer = {folder / TOKENIZER / file: own for file, own in (added.files if added else {}).items()}
    try:
        write_all({**tokenizer, folder / FILE: content, folder / DESCRIPTION: as_json(description)})
    except OSError as error:
        raise AdapterFileError(
            f'cannot write the adapter to "{folder}": {error.strerror or error}. What was there before is intact.'
        ) from error
    return folder


def _check_readable(content: bytes, tensors: Mapping[str, Tensor]) -> None:
    written = from_bytes(content)
    for key, tensor in tensors.items():
        if key not in written or not torch.equal(_bits(written[key]), _bits(tensor)):
            raise AdapterFileError(f"the adapter does not read back as it is ({key}); nothing was written.")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def read_folder(directory: str | Path) -> Stored:
    """Read an adapter folder without a model.

    Raises:
        AdapterFileError: missing, truncated, or not an adapter of this library.
    """
    folder = Path(directory)
    path = folder / FILE
    if not path.is_file():
        raise AdapterFileError(_missing(folder))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "lora_lightning":
                raise AdapterFileError(f'"{path}" was not written by this library: its metadata lacks the format.')
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        content = json.loads(metadata["adapter"])
        newer = content["schema_version"] > SCHEMA
        given = {} if newer else _fields(content)
        given["vocabulary"] = _vocabulary(folder, content.get("vocabulary"))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise AdapterFileError(f'"{path}" is truncated or damaged: {reason}. Save the adapter again.') from error
    if newer:
        raise AdapterFileError(
            f'"{path}" has schema version {content["schema_version"]}; this library reads up to {SCHEMA}. Update it.'
        )
    return Stored(**given, tensors=tensors)


def _fields(content: dict[str, Any]) -> dict[str, Any]:
    """What a description gives of the fields of `Stored`."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(Stored):
        if field.name not in ("tensors", "vocabulary", "quantization", "plan", "linked"):
            given[field.name] = content[field.name]
    given["trained"], given["quantization"] = tuple(content["trained"]), described_formats(content)
    given["plan"], given["linked"] = content.get("plan", {}), tuple(content.get("linked", ()))  # 0.1 wrote neither
    return given


def _vocabulary(folder: Path, content: dict[str, Any] | None) -> Vocabulary | None:
    if content is None:
        return None
    files = {path.name: path.read_bytes() for path in sorted((folder / TOKENIZER).glob("*")) if path.is_file()}
    return Vocabulary(tuple(content["tokens"]), content["first"], files)


def _missing(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f'"{folder}" holds an adapter in peft\'s format; read it with import_peft.'
    if (folder / "adapter" / FILE).is_file():
        return f'"{folder}" is a run folder; its adapter is "{folder / "adapter"}".'
    parent = folder.parent
    close = nearest(folder.name, [p.parent.name for p in parent.glob(f"*/{FILE}")]) if parent.is_dir() else []
    hint = f" Nearest: {', '.join(close)}." if close else ""
    return f'"{folder}" holds no {FILE}.{hint}'
