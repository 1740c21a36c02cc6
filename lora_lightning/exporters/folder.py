"""Writing a whole folder so that a failure at any point leaves what was there before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from lora_lightning.errors import ExportError
from lora_lightning.storage.atomic import flush, if_abandoned, lock_folder, new_folder, standing_beside

SIDE_FILE = "lora_lightning.json"
"""Our own description; a folder that holds it is an earlier export, which a new one may replace."""

_WRITING = ".writing"
_REPLACED = ".replaced"

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
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        finish_interrupted(folder)
        with new_folder(folder, _WRITING) as beside:
            try:
                result = fill(beside)
                for path in [*beside.rglob("*"), beside]:
                    flush(path)
                with lock_folder(folder.parent):
                    _exchange(beside, folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ExportError(f'cannot write "{folder}": {reason}. What was there before is intact.') from error
    return result


def _exchange(beside: Path, folder: Path) -> None:
    """Rename `beside` to `folder`; an earlier folder is kept until the new one is there."""
    old = beside.with_name(beside.name.removesuffix(_WRITING) + _REPLACED)
    if folder.exists():
        folder.rename(old)
    try:
        beside.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def finish_interrupted(folder: Path) -> None:
    """Undo what an interrupted export to `folder` has left beside it, in words; to be called before it is read, too.

    While a folder is being replaced, there is a moment in which the earlier one only stands beside its place. After a
    kill in that moment it is put back.

    Raises:
        ExportError: it cannot be put back.
    """
    if not (_beside(folder, _REPLACED) or _beside(folder, _WRITING)):
        return
    with lock_folder(folder.parent):  # a folder that is being replaced right now is so under this lock
        for old in _beside(folder, _REPLACED):
            _put_back(old, folder)
        for beside in _beside(folder, _WRITING):
            with if_abandoned(beside) as abandoned:
                if abandoned:
                    _remove(beside, folder)


def _put_back(old: Path, folder: Path) -> None:
    if folder.exists():
        _remove(old, folder)
        return
    try:
        old.rename(folder)
    except OSError as error:
        raise ExportError(
            f'"{folder}": an export was interrupted, and what was there before stands as "{old}". Putting it back '
            f"fails: {error.strerror or error}."
        ) from error
    print(f'note: "{folder}": an export that was interrupted is undone; the one from before is there')


def _remove(leftover: Path, folder: Path) -> None:
    with suppress(OSError):  # in a folder that cannot be written it does no harm
        shutil.rmtree(leftover)
        print(f'note: "{folder}": what an interrupted export had left beside it is removed')


def _beside(folder: Path, ending: str) -> list[Path]:
    """Folders of exports of ours that stand beside `folder`, those of version 0.1 too."""
    of_0_1 = folder.with_name(f".{folder.name}{ending}")
    return [*standing_beside(folder, ending), *([of_0_1] if of_0_1.is_dir() and not of_0_1.is_symlink() else [])]
