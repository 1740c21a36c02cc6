"""The run folder: where a fit puts everything, held by one process, and left as it was by a fit that is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_lightning.errors import RunFolderError
from lora_lightning.storage.atomic import write_all
from lora_lightning.storage.inside import shortened

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

VARIABLE = "LORA_LIGHTNING_RUN"
"""Tells processes started by a launcher which folder the first one has made."""
LOCK = ".lock"
_OF_A_RUN = ("config.yaml", "last.ckpt", "summary.json", "adapter")


class RunFolder:
    """The folder of one fit.

    Attributes:
        path: the folder, absolute, so that a program that changes its directory goes on writing there; None until
            `begin` or `resume`.
        start: the directory that the program was started in.
        started: whether training has begun, from when on `close` keeps what is there.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.started = False
        self.start = Path.cwd()
        self._made: list[Path] = []
        self._before: dict[Path, bytes | None] = {}
        self._lock: Lock | None = None

    def begin(self, stem: str, root: Path = Path("runs"), rank: int = 0) -> Path:
        """Make `runs/<stem>/<NNN>` with the next free number; processes the first one launches are told.

        Processes that something else launched beside it (torchrun, a cluster) learn the folder by broadcast, once they
        can talk: until then a rank above 0 has a name that nothing is written under.

        Raises:
            RunFolderError: the folder cannot be made, or the environment names one that holds a run.
        """
        told = os.environ.get(VARIABLE)
        parent = root.absolute() / stem
        if rank > 0:
            self.path = Path(told) if told else parent / "pending"
            return self.path
        folder = Path(told).absolute() if told else parent / f"{last_number(parent) + 1:03d}"
        if there := next((name for name in _OF_A_RUN if told and (folder / name).exists()), None):
            raise RunFolderError(
                f"the environment sets {VARIABLE}={told}, where a run has left {there}, which this one would replace. "
                f"Unset it, or go on with fit --resume {told}."
            )
        if told and folder.is_dir():
            self._keep(folder)
        self.path = self._make(folder, again=told is not None)
        self._lock = Lock(self.path / LOCK)
        return self.path

    def resume(self, folder: Path, rank: int = 0) -> Path:
        """Go on in a folder.

        Raises:
            RunFolderError: another process is at work there.
        """
        folder = folder.absolute()
        self.path = folder
        if rank > 0:
            return folder
        self._lock = Lock(folder / LOCK)
        self._keep(folder)
        keep_metrics(folder)
        return folder

    def close(self, refused: bool) -> None:
        """Let go of the folder; of a run that was refused before it started nothing stays."""
        os.environ.pop(VARIABLE, None)
        if self._lock is not None and refused and not self.started and self.path is not None:
            self._undo(self.path)
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        for folder in reversed(self._made):
            with suppress(OSError):  # it holds something
                folder.rmdir()

    def _keep(self, folder: Path) -> None:
        """Remember what is in a folder, and the contents of its texts."""
        texts = [path for path in folder.iterdir() if path.suffix in (".yaml", ".csv", ".json")]
        self._before = {path: None for path in folder.iterdir() if path.name != LOCK}
        self._before |= {path: path.read_bytes() for path in texts}

    def _make(self, folder: Path, again: bool) -> Path:
        while True:
            missing = [path for path in reversed((folder, *folder.parents)) if not path.exists()]
            try:
                folder.mkdir(parents=True, exist_ok=again)
            except FileExistsError:
                folder = folder.with_name(f"{int(folder.name) + 1:03d}")
                continue
            except OSError as error:
                raise RunFolderError(
                    f'cannot make the run folder "{shortened(folder, self.start)}": {error.strerror}.'
                ) from error
            self._made = missing
            os.environ[VARIABLE] = str(folder)
            return folder

    def _undo(self, folder: Path) -> None:
        """Put back what was there: files that are new go, files that changed or went come back."""
        if self._made and folder in self._made:
            shutil.rmtree(folder, ignore_errors=True)
            return
        for path in folder.iterdir():
            if path not in self._before and path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        changed = {path: was for path, was in self._before.items() if was is not None and _bytes(path) != was}
        if changed:
            write_all(changed)


class Lock:
    """A file that one process at a time holds; that of a process that has died is free.

    Raises:
        RunFolderError: another process holds it, or the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._handle = path, -1
        while self._handle < 0:
            self._handle = self._taken()

    def release(self) -> None:
        """Remove the file."""
        with suppress(OSError):
            self.path.unlink()
        with suppress(OSError):
            os.close(self._handle)

    def _taken(self) -> int:
        """An open handle; below 0 where the file was removed or replaced meanwhile."""
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunFolderError(f'cannot write into the run folder "{self.path.parent}": {error.strerror}.') from error
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(handle)
            os.close(handle)
            if not _is_dead(owner):
                who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
                raise RunFolderError(
                    f"{self.path.parent}: {who} is training in this run folder. Wait until it ends, or stop it; to "
                    "train beside it, start another run with fit --config."
                ) from None
            with suppress(FileNotFoundError):  # its children hold on to it for a moment
                self.path.unlink()
            return -1
        except OSError:  # a file system without locks
            pass
        with suppress(OSError):
            if os.fstat(handle).st_ino == self.path.stat().st_ino:
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
                return handle
        os.close(handle)
        return -1


def keep_metrics(folder: Path) -> None:
    """Rename metrics.csv before a resumed run's logger deletes it."""
    metrics = folder / "metrics.csv"
    if metrics.is_file():
        number = 1
        while (folder / f"metrics.{number}.csv").exists():
            number += 1
        metrics.rename(folder / f"metrics.{number}.csv")


def last_number(parent: Path) -> int:
    """The largest number that names a folder; 0 where there is none."""
    return max((int(path.name) for path in parent.glob("[0-9]*") if path.name.isdigit()), default=0)


def _owner(handle: int) -> dict[str, Any]:
    """Who wrote a lock; empty where it says nothing yet."""
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) and {"pid", "host"} <= set(owner) else {}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether a process of this machine is no more."""
    if not owner or owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
