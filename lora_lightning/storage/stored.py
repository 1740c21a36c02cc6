"""An adapter folder, read without a model: what it states, its tensors, and the tokenizer of its new tokens.

Each part is compared with its digest in adapter.safetensors. What is damaged, edited, or of another save is refused by
name, and so is a link that leads out of the folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lightning.errors import AdapterFileError, nearest
from lora_lightning.models.new_tokens import Vocabulary
from lora_lightning.models.token_rows import TokenRows
from lora_lightning.storage.commit import Layout, settled
from lora_lightning.storage.description import described_formats
from lora_lightning.storage.inside import names_inside, read_inside
from lora_lightning.storage.sealed import Sealed, digest, unseal

FILE = "adapter.safetensors"
DESCRIPTION = "adapter.json"
TOKENIZER = "tokenizer"
CARD = "README.md"
LAYOUT = Layout(commits=FILE, follows=DESCRIPTION, folder=TOKENIZER, also=(CARD,))


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
    tokens: dict[str, TokenRows] = dataclasses.field(default_factory=dict)
    """Known tokens whose rows have trained, by the path of the layer."""
    untied: tuple[str, ...] = ()
    """Paths of output layers that had been given a weight of their own."""
    description: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    """All that the file states, as it stands there."""
    below: tuple[dict[str, str], ...] = ()
    """Adapters that it was trained on top of: digest and source of each."""
    digest: str = ""
    """sha256 of adapter.safetensors, which tells this adapter from every other one."""


def read_folder(directory: str | Path) -> Stored:
    """Read an adapter folder without a model; a save that was interrupted there is completed or undone first.

    Raises:
        AdapterFileError: missing, damaged, edited or mixed, naming the tensor, field or file; a link out of the folder;
            or not an adapter of this library.
    """
    folder = Path(directory)
    with settled(folder, LAYOUT):
        if not (folder / FILE).is_file():
            raise AdapterFileError(_missing(folder))
        return read_settled(folder)


def read_settled(folder: Path) -> Stored:
    """As `read_folder`, of a folder that nobody writes, and where no save was interrupted."""
    path = folder / FILE
    try:
        content = read_inside(folder, FILE)
        sealed = unseal(content)
        given = _fields(sealed.description)
    except AdapterFileError as error:
        raise AdapterFileError(f'"{path}" {error}' if not str(error).startswith('"') else str(error)) from error
    except Exception as error:  # whatever a library raises for bytes that no save has written
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise AdapterFileError(f'"{path}" is truncated or damaged: {reason}. Save the adapter again.') from error
    _check_description(folder, sealed.description)
    given["vocabulary"] = _vocabulary(folder, sealed)
    return Stored(**given, tensors=sealed.tensors, description=sealed.description, digest=digest(content))


def _check_description(folder: Path, description: dict[str, Any]) -> None:
    """Compare adapter.json, where there is one, with what it was written from."""
    path = folder / DESCRIPTION
    if not (path.exists() or path.is_symlink()):
        return
    way_out = f"It is written from {FILE} and changes nothing: delete it, or save the adapter again."
    try:
        there = json.loads(read_inside(folder, DESCRIPTION))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f'"{path}" is damaged: {error}. {way_out}') from error
    differing = _differing(description, there)
    if differing is not None:
        raise AdapterFileError(f'"{path}" differs from {FILE} in {differing}. {way_out}')


def _differing(own: Any, there: Any, where: str = "") -> str | None:
    """The first field in which two pieces of plain data differ, with both values; None where there is none."""
    if isinstance(own, dict) and isinstance(there, dict):
        for key in [*own, *(key for key in there if key not in own)]:
            path = f"{where}.{key}".removeprefix(".")
            if key not in own or key not in there:
                return f"{path}, which {'it' if key not in there else FILE} lacks"
            found = _differing(own[key], there[key], path)
            if found is not None:
                return found
        return None
    same = type(own) is type(there) and own == there
    return None if same else f"{where or 'all of it'}: {there!r} in place of {own!r}"


_STATED: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "method": str,
    "settings": dict,
    "layers": dict,
    "trained": list,
    "seed": int,
    "fingerprint": dict,
    "versions": dict,
    "base": (str, type(None)),
}
_LATER: dict[str, type[Any]] = {"plan": dict, "linked": list, "tokens": dict, "untied": list}
"""Fields of a description by the type of their value; the later ones were not written by 0.1."""


def _fields(content: dict[str, Any]) -> dict[str, Any]:
    """What a description gives of the fields of `Stored`."""
    given: dict[str, Any] = {field: content[field] for field in _STATED}
    given |= {field: content.get(field, kind()) for field, kind in _LATER.items()}
    for field, kind in {**_STATED, **_LATER}.items():
        if not isinstance(given[field], kind):
            raise ValueError(f"{field} is {given[field]!r}")
    for field in ("layers", "plan"):
        for path, value in given[field].items():
            if not isinstance(value, dict):
                raise ValueError(f"{field}[{path}] is {value!r}")
    for field in ("trained", "linked", "untied"):
        given[field] = tuple(map(str, given[field]))
    for part in ("architecture", "names", "weights"):
        if not isinstance(given["fingerprint"][part], str | None):
            raise ValueError(f"fingerprint.{part} is {given['fingerprint'][part]!r}")
    for part in ("statistics", "buffers"):  # 0.1 has none
        value = given["fingerprint"].get(part)
        if value is not None and not (isinstance(value, dict) and {"dtypes", "sha256"} <= value.keys()):
            raise ValueError(f"fingerprint.{part} is {value!r}")
    given["tokens"] = {path: _token_rows(path, rows) for path, rows in given["tokens"].items()}
    given["quantization"] = described_formats(content)
    given["below"] = tuple(map(_below, content.get("below", [])))
    _added(content)
    return given


def _token_rows(path: str, stated: Any) -> TokenRows:
    ids, tokens = stated["ids"], stated["tokens"]
    good = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) and ids == sorted(set(ids)) != []
    if not (good and isinstance(tokens, list) and len(tokens) in (0, len(ids))):
        raise ValueError(f"tokens[{path}] is {stated!r}")
    return TokenRows(tuple(ids), tuple(map(str, tokens)))


def _below(item: Mapping[str, Any]) -> dict[str, str]:
    """An adapter below, as a description states it."""
    found = {key: item[key] for key in ("digest", "source")}
    if not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"below is {item!r}")
    return found


def _added(content: Mapping[str, Any]) -> tuple[int, tuple[str, ...]] | None:
    """Id of the first new token, and the tokens; None where there are none."""
    added = content.get("vocabulary")
    if added is None:
        return None
    first, tokens = added["first"], added["tokens"]
    if (
        type(first) is not int
        or first < 0
        or not (isinstance(tokens, list) and all(isinstance(t, str) for t in tokens))
    ):
        raise ValueError(f"vocabulary is {added!r}")
    return first, tuple(tokens)


def _vocabulary(folder: Path, sealed: Sealed) -> Vocabulary | None:
    """New tokens, and the files of their tokenizer, each compared with its digest."""
    added = _added(sealed.description)
    if added is None:
        return None
    way_out = "Save the adapter again, or bring the whole folder."
    there = _tokenizer_files(folder)
    wanted = dict.fromkeys(there) if sealed.files is None else sealed.files
    for name in sorted(wanted.keys() ^ set(there)):
        what = "is missing" if name in wanted else f"is no file of this adapter: it was not saved with {FILE}"
        raise AdapterFileError(f'"{folder / name}" {what}. {way_out}')
    files = {}
    for name in there:
        content = read_inside(folder, name)
        if wanted[name] not in (None, digest(content)):
            why = "it is damaged, edited, or of another save"
            raise AdapterFileError(f'"{folder / name}" is not what was saved with {FILE}: {why}. {way_out}')
        files[Path(name).name] = content
    return Vocabulary(added[1], added[0], files)


def belonging(folder: Path) -> list[str]:
    """Names of the files that belong to the adapter in a folder; none where there is no adapter that can be read."""
    try:
        sealed = unseal(read_inside(folder, FILE))
        files = _tokenizer_files(folder) if sealed.files is None and _added(sealed.description) else sealed.files
    except Exception:  # what is damaged in any way has no files that are known
        return []
    return [name for name in (*(files or ()), DESCRIPTION) if LAYOUT.has(name)]


def _tokenizer_files(folder: Path) -> list[str]:
    return [f"{TOKENIZER}/{name}" for name in names_inside(folder, TOKENIZER)]


def _missing(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f'"{folder}" holds an adapter in peft\'s format; read it with import_peft.'
    if (folder / "adapter" / FILE).is_file():
        return f'"{folder}" is a run folder; its adapter is "{folder / "adapter"}".'
    parent = folder.parent
    close = nearest(folder.name, [p.parent.name for p in parent.glob(f"*/{FILE}")]) if parent.is_dir() else []
    hint = f" Nearest: {', '.join(close)}." if close else ""
    return f'"{folder}" holds no {FILE}.{hint}'
