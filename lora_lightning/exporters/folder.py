"""Writing a whole folder so that a failure at any point leaves what was there before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from lora_lightning.errors import ExportError
from lora_lightning.storage.atomic import flush

SIDE_FILE = "lora_lightning.json"
"""Our own description; a folder that holds it is an earlier export, which a new one may replace."""

T = TypeVar("T")


def check_free(directory: str | Path) -> Path:
    """The folder to write, links resolved.

    Raises:
        ExportError: it is a file, or holds something that no export of ours wrote.
    """
    folder = Path(directory).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ExportError(f'"{directory}" is a file; an export is a folder. Choose another name.')
    content = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if content and SIDE_FILE not in content:
        raise ExportError(
            f'"{directory}" holds {len(content)} files that are no export of ours, such as {content[0]}; nothing there '
            "was touched. Choose an empty or a new folder."
        )
    return folder


def check_only_ours(folder: Path, files: list[str]) -> None:
    """Raise `ExportError` if an earlier export at `folder` has company: replacing it would delete that too."""
    others = sorted({path.name for path in folder.iterdir()} - {*files, SIDE_FILE}) if folder.is_dir() else []
    if others:
        raise ExportError(
            f'"{folder}" is an earlier export, but holds {others[0]} too, which a new one would delete. Move it away, '
            "or choose another folder."
        )


def write_folder(folder: Path, fill: Callable[[Path], T]) -> T:
    """Fill a folder beside, flush it to the disk, and put it in the place of `folder`.

    Raises:
        ExportError: the disk is full or the place is not writable; what was there is intact, nothing is left over.
    """
    beside = folder.with_name(f".{folder.name}.writing")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if beside.exists():
            shutil.rmtree(beside)
        beside.mkdir()
        result = fill(beside)
        for path in [*beside.rglob("*"), beside]:
            flush(path)
        _exchange(beside, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ExportError(f'cannot write "{folder}": {reason}. What was there before is intact.') from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return result


def _exchange(beside: Path, folder: Path) -> None:
    """Rename `beside` to `folder`; an earlier folder is kept until the new one is there."""
    old = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        beside.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
