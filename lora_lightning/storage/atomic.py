"""Writing files so that a kill or a full disk leaves the old one whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, flush to the disk, replace. On any error the old file stays and nothing is left over.

    Args:
        path: the file; its folder is made if need be.
        write: receives the open binary file.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    _write({path: write})


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write several files; only when all of them are on the disk is the first one replaced, then the next.

    On any error before that the old files stay, and neither new files nor new folders are left over.

    Args:
        files: what each file holds, by its path, in the order of replacement.

    Raises:
        OSError: a folder cannot be written, or the disk is full.
    """
    _write({path: partial(_put, content) for path, content in files.items()})


def _put(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _write(files: Mapping[Path, Callable[[BinaryIO], object]]) -> None:
    made: list[Path] = []
    beside = {path: path.with_name(f".{path.name}.writing") for path in files}
    try:
        for path, write in files.items():
            made += [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside[path].open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for path, written in beside.items():
            written.replace(path)
    except BaseException:
        for written in beside.values():
            with suppress(OSError):
                written.unlink()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise
    for folder in {path.parent for path in files}:
        flush(folder)


def flush(path: Path) -> None:
    """Bring a file, or a folder's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_json(content: Any) -> bytes:
    """`content` as readable JSON."""
    return (json.dumps(content, indent=2) + "\n").encode()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as readable JSON, atomically."""
    write_all({path: as_json(content)})
