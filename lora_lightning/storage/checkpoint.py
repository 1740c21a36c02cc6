"""Trainer checkpoints with a digest of everything in them, compared before anything of one is restored.

A checkpoint is torch's own file: a zip archive with a record for each tensor's memory, and for the rest. One more
record, `archive/digests.json`, at which torch does not look, holds the sha256 of every other one. Files of 0.1 lack it;
of these the archive's own checksums are compared, which torch does not do.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lora_lightning.errors import ResumeError

_DIGESTS = "archive/digests.json"
"""In the folder of all records of an archive that torch has written into an open file."""
_CHUNK = 2**22


def write_checkpoint(content: Mapping[str, Any], file: BinaryIO) -> None:
    """Save `content` as torch does, with the digests of what was written.

    Args:
        content: the checkpoint.
        file: open for writing and reading.
    """
    torch.save(content, file)
    file.flush()
    with zipfile.ZipFile(file, "a") as archive:
        digests = {name: _digest(archive, name) for name in archive.namelist()}
        archive.writestr(zipfile.ZipInfo(_DIGESTS), json.dumps(digests))


def check_checkpoint(path: str | Path) -> None:
    """Compare a checkpoint with its digests; nothing of it is unpickled before.

    A path that is no file here is not judged: a remote one, or the folder of a strategy that writes in its own way.

    Raises:
        ResumeError: it is truncated or damaged, naming the tensor where that is known.
    """
    if not Path(path).is_file():
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            digests = json.loads(archive.read(_DIGESTS)) if _DIGESTS in names else None
            for name in names:
                found = _digest(archive, name)  # raises where the archive's own checksum differs
                if digests is not None and name != _DIGESTS and digests.get(name) != found:
                    raise ValueError(f"{_name_of(Path(path), name)} is not what was saved")
            missing = sorted((digests or {}).keys() - set(names))
            if missing:
                raise ValueError(f"{missing[0]} is missing")
        with suppress(pickle.UnpicklingError):  # it holds more than tensors and plain values, which is no damage
            torch.load(path, map_location="meta", weights_only=True)  # torch reads more of an archive's structure
    except Exception as error:  # whatever reading raises for bytes that no save has written
        damaged = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, zipfile.BadZipFile) and damaged.startswith("Bad CRC-32 for file '"):
            damaged = f"{_name_of(Path(path), damaged.split(chr(39))[1])} is not what was saved"
        raise ResumeError(
            f'the checkpoint "{path}" is truncated or damaged: {damaged}. Nothing of it was restored. Resume from '
            "another checkpoint, or start a new run."
        ) from error


def _digest(archive: zipfile.ZipFile, name: str) -> str:
    found = hashlib.sha256()
    with archive.open(name) as record:
        while part := record.read(_CHUNK):
            found.update(part)
    return found.hexdigest()


def _name_of(path: Path, record: str) -> str:
    """Where the tensor stands in the checkpoint whose memory a damaged record is; where that is unknown, the record."""
    folder, _, number = record.rpartition("/data/")
    if not (folder and number.isdecimal()):
        return record
    try:  # the rest of the file says where tensors are, and only a name is wanted
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return record
    names: dict[int, str] = {}  # by storage, in the order in which torch writes and numbers them
    for name, tensor in _tensors(content, ""):
        names.setdefault(tensor.untyped_storage()._cdata, name)
    return dict(enumerate(names.values())).get(int(number), record)


def _tensors(content: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield where, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{where}.{key}".removeprefix("."))
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from _tensors(value, f"{where}[{number}]")
