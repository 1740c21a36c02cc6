"""Writing files so that a kill or a full disk leaves the old one whole.

What is written first stands beside its place, as `.NAME.TOKEN.writing`. The token is drawn for each call, the file is
made exclusively, and a link is never followed; so neither another process nor a planted file can be mixed in. Its
writer holds a lock on it. Where the lock is free, the writer is gone, and the next call removes what it left.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

_WRITING = ".writing"
_TOKEN = re.compile(r"[0-9a-f]{16}")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, flush to the disk, replace. On any error the old file stays and nothing is left over.

    Args:
        path: the file; its folder is made if need be.
        write: receives the binary file, open for writing and reading.

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
    beside: dict[Path, Path] = {}
    with ExitStack() as locks, undone_on_error() as made:
        try:
            for path, write in files.items():
                make_folder(path.parent, made)
                _remove_leftovers(path)
                beside[path], handle = locks.enter_context(_new_file(path))
                with os.fdopen(os.dup(handle), "w+b") as file:
                    write(file)
                    file.flush()
                    os.fsync(handle)
            for path, written in beside.items():
                written.replace(path)
        except BaseException:
            for written in beside.values():
                with suppress(OSError):
                    written.unlink()
            raise
    for folder in {path.parent for path in files}:
        flush(folder)


@contextmanager
def undone_on_error() -> Iterator[list[Path]]:
    """Gives a list for new folders; on an error those that are empty are removed again, the last ones first."""
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        raise


def make_folder(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it, and note the new ones."""
    made += reversed([above for above in (folder, *folder.parents) if not above.exists()])
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _new_file(path: Path) -> Iterator[tuple[Path, int]]:
    """A new, empty file beside `path`, locked while it is being written, with its handle."""
    while True:
        beside = named_beside(path, _WRITING)
        handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            if not claimed(handle, beside):
                continue
            yield beside, handle
            return
        finally:
            os.close(handle)


def _remove_leftovers(path: Path) -> None:
    for beside in standing_beside(path, _WRITING):
        with if_abandoned(beside) as abandoned:
            if abandoned:
                beside.unlink()
                print(f'note: "{path}": what an interrupted write had left beside it is removed')


# -- names and locks ---------------------------------------------------------------------------------------------------


def named_beside(path: Path, ending: str) -> Path:
    """A name beside `path` that no other call uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{ending}")


def standing_beside(path: Path, ending: str) -> list[Path]:
    """What stands beside `path` under such a name, links left out; nothing where the folder cannot be listed."""
    start = f".{path.name}."
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
    found = [name for name in names if name.startswith(start) and name.endswith(ending)]
    ours = [path.with_name(name) for name in found if _TOKEN.fullmatch(name[len(start) : -len(ending)])]
    return sorted(own for own in ours if not own.is_symlink())


def claimed(handle: int, path: Path) -> bool:
    """Lock what has just been made at `path`; False where another process has taken it for a leftover already."""
    if not locked(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
        return False
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def locked(handle: int, how: int) -> bool:
    """Lock an open file or folder; False where it is held. A file system without locks grants everything."""
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


@contextmanager
def new_folder(path: Path, ending: str) -> Iterator[Path]:
    """A new folder beside `path`, under a name of its own and locked inside, so that nobody takes it for a leftover."""
    handle = None
    while handle is None:
        beside = named_beside(path, ending)
        beside.mkdir()
        handle = _claim(beside)
    try:
        yield beside
    finally:
        os.close(handle)


def _claim(folder: Path) -> int | None:
    """An open handle that holds the lock of a new folder; None where another process has taken it for a leftover."""
    with suppress(FileNotFoundError):
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if claimed(handle, folder):
            return handle
        os.close(handle)
    with suppress(OSError):
        folder.rmdir()
    return None


@contextmanager
def lock_folder(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold a lock on a folder; none where there is no such folder, or where its file system has no locks."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        locked(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def if_abandoned(path: Path) -> Iterator[bool]:
    """Whether the process that made `path` is gone; inside, no other process takes it for a leftover.

    False for a link, and where the file system has no locks to tell.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(handle), path.lstat())
        except OSError:
            free = False
        yield free
    finally:
        os.close(handle)


def read_regular(path: Path) -> bytes:
    """The content of a file that is no link, no pipe and no device.

    Raises:
        OSError: it is one of these, or cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return file.read()


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
