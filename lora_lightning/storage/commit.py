"""Replacing the files of an adapter folder, of which one commits: the old files or the new ones, never a mixture.

    FOLDER/.NAME.TOKEN.saving/          a new version, whole, and plan.json, which says what it replaces
    FOLDER/NAME                         the file that commits: the new version counts from the moment it stands here

The new version is written, flushed and checked beside the old one. Then its committing file is renamed into place, and
its other files follow. Where a process is killed before the rename, the next call undoes what it has begun; after it,
the next call completes it. Both are said. Who writes holds a lock on the folder from before the rename to the end, who
reads holds a shared one; a version that is being written is locked by its writer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_lightning.errors import AdapterFileError
from lora_lightning.storage.atomic import (
    as_json,
    flush,
    if_abandoned,
    lock_folder,
    make_folder,
    new_folder,
    read_regular,
    standing_beside,
    undone_on_error,
)
from lora_lightning.storage.sealed import digest

_SAVING = ".saving"
_PLAN = "plan.json"


@dataclass(frozen=True)
class Layout:
    """Which files a folder has."""

    commits: str
    """Name of the file that commits."""
    follows: str
    """Name of the file beside it."""
    folder: str
    """Name of the one folder of further files."""
    also: tuple[str, ...] = ()
    """Names of files that a reader does without; they stay where a new version brings none."""

    def has(self, name: str) -> bool:
        """Whether `name` is one of the files that follow, or may be."""
        parts = PurePosixPath(name).parts
        return name in (self.follows, *self.also) or (len(parts) == 2 and parts[0] == self.folder and parts[1] != "..")

    def check(self, name: str) -> str:
        """`name`, if the folder may have it; raises ValueError otherwise."""
        if not self.has(name):
            raise ValueError(f"{name!r} is no file of such a folder")
        return name


def replace_files(
    folder: Path,
    layout: Layout,
    files: Mapping[str, bytes],
    check: Callable[[Path], object],
    belongs: Callable[[Path], Collection[str]],
) -> None:
    """Put files into a folder in the place of those that are there, all or none.

    Args:
        folder: made if need be.
        layout: of the folder.
        files: by name in the folder, the committing one among them.
        check: called with the new version's own folder before it counts; raises where it is not good.
        belongs: called with the folder, names the files of the version that is there; those without a successor go.

    Raises:
        OSError: the folder cannot be written; what was there is intact.
        AdapterFileError: a link or a folder is in the way; or the new version counts, but some of its files could not
            be moved, which the next call does.
    """
    with undone_on_error() as made:
        make_folder(folder, made)
        _settle(folder, layout)
        with new_folder(folder / layout.commits, _SAVING) as beside:
            try:
                for name, content in files.items():
                    _write_new(beside / name, content)
                check(beside)
                with lock_folder(folder):
                    _finish_abandoned(folder, layout)
                    _refuse_what_is_in_the_way(folder, layout, files)
                    plan = {
                        "commit": digest(files[layout.commits]),
                        "move": [name for name in files if name != layout.commits],
                        "remove": sorted(set(belongs(folder)) - files.keys()),
                    }
                    _write_new(beside / _PLAN, as_json(plan))
                    flush(beside)
                    (beside / layout.commits).replace(folder / layout.commits)
                    _finish_committed(folder, layout, beside)
            except BaseException:
                if not _has_committed(folder, layout, beside):
                    shutil.rmtree(beside, ignore_errors=True)
                raise


def _finish_committed(folder: Path, layout: Layout, beside: Path) -> None:
    try:
        flush(folder)
        _follow(folder, layout, beside)
    except OSError as error:
        raise AdapterFileError(
            f'"{folder}": the new adapter counts, but {error.strerror or error} before all of its files were in their '
            "places; the next call that reads or writes the folder moves the others."
        ) from error


def _write_new(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(handle)


def _refuse_what_is_in_the_way(folder: Path, layout: Layout, files: Mapping[str, bytes]) -> None:
    """Raise `AdapterFileError` for a link that would be followed, and for a folder in the place of a file."""
    into = folder / layout.folder
    if into.is_symlink() or (into.exists() and not into.is_dir()):
        raise AdapterFileError(f'"{into}" is {"a link" if into.is_symlink() else "a file"}; remove it first.')
    for name in files:
        if (folder / name).is_dir():
            raise AdapterFileError(f'"{folder / name}" is a folder, where a file is to be; remove it first.')


# -- what was interrupted ----------------------------------------------------------------------------------------------


@contextmanager
def settled(folder: Path, layout: Layout) -> Iterator[None]:
    """Complete or undo what was interrupted in a folder, in words; inside, no other process replaces its files.

    Raises:
        AdapterFileError: something has to be completed, and the folder cannot be written.
    """
    with lock_folder(folder, shared=True):
        abandoned = any(map(_is_abandoned, standing_beside(folder / layout.commits, _SAVING)))
    if abandoned:
        _settle(folder, layout)
    with lock_folder(folder, shared=True):
        yield


def _settle(folder: Path, layout: Layout) -> None:
    if standing_beside(folder / layout.commits, _SAVING):
        with lock_folder(folder):
            _finish_abandoned(folder, layout)


def _is_abandoned(beside: Path) -> bool:
    with if_abandoned(beside) as abandoned:
        return abandoned


def _finish_abandoned(folder: Path, layout: Layout) -> None:
    for beside in standing_beside(folder / layout.commits, _SAVING):
        with if_abandoned(beside) as abandoned:
            if not abandoned:
                continue
            if _has_committed(folder, layout, beside):
                try:
                    _follow(folder, layout, beside)
                except (OSError, ValueError, KeyError, TypeError) as error:
                    raise AdapterFileError(
                        f'"{folder}": a save was interrupted, and completing it fails: {error}. Make the folder '
                        "writable, or save the adapter again."
                    ) from error
                print(f'note: "{folder}": a save that was interrupted is completed; the new adapter is there')
            else:
                with suppress(OSError):
                    shutil.rmtree(beside)
                    there = "the adapter from before is there" if (folder / layout.commits).exists() else "it was new"
                    print(f'note: "{folder}": a save that was interrupted is undone; {there}')


def _has_committed(folder: Path, layout: Layout, beside: Path) -> bool:
    """Whether the version whose files stand in `beside` is the one that counts."""
    if (beside / layout.commits).exists():
        return False
    try:
        plan = json.loads(read_regular(beside / _PLAN))
        return bool(plan["commit"] == digest(read_regular(folder / layout.commits)))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _follow(folder: Path, layout: Layout, beside: Path) -> None:
    """Move the other files of a version that counts to their places, and remove those it has no successors for."""
    plan = json.loads(read_regular(beside / _PLAN))
    _refuse_what_is_in_the_way(folder, layout, {})
    for name in map(layout.check, plan["move"]):
        if (beside / name).exists():  # else it was moved already
            (folder / name).parent.mkdir(exist_ok=True)
            (beside / name).replace(folder / name)
    for name in map(layout.check, plan["remove"]):
        with suppress(FileNotFoundError):
            (folder / name).unlink()
    with suppress(OSError):
        (folder / layout.folder).rmdir()  # where nothing is left in it
    for path in (folder / layout.folder, folder):
        if path.is_dir():
            flush(path)
    shutil.rmtree(beside)
