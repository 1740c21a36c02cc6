"""The run folder: where a fit puts everything, numbered by the first process and known to all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from lora_lightning.errors import RunFolderError

VARIABLE = "LORA_LIGHTNING_RUN"
"""Tells processes started by a launcher which folder the first one has made."""


def new_folder(stem: str, root: Path = Path("runs"), rank: int = 0) -> Path:
    """Make `runs/<stem>/<NNN>` with the next free number; processes the first one launches are told.

    Processes that something else launched beside it (torchrun, a cluster) learn the folder by broadcast, once they can
    talk: until then a rank above 0 has a name that nothing is written under.

    Raises:
        RunFolderError: the folder cannot be made.
    """
    if told := current():
        return told
    if rank > 0:
        return root / stem / "pending"
    parent = root / stem
    number = 1 + max((int(path.name) for path in parent.glob("[0-9]*") if path.name.isdigit()), default=0)
    while True:
        folder = parent / f"{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        except OSError as error:
            raise RunFolderError(f'cannot make the run folder "{folder}": {error.strerror}.') from error
        os.environ[VARIABLE] = str(folder)
        return folder


def current() -> Path | None:
    """The folder that `new_folder` has made, until it is forgotten."""
    told = os.environ.get(VARIABLE)
    return Path(told) if told else None


def forget(rank: int = 0) -> None:
    """Let the next fit of this process have a folder of its own; one in which nothing was written is removed."""
    told = os.environ.pop(VARIABLE, None)
    if told is not None and rank == 0:
        with suppress(OSError):  # it holds something
            Path(told).rmdir()


def keep_metrics(folder: Path) -> None:
    """Rename metrics.csv before a resumed run's logger deletes it."""
    metrics = folder / "metrics.csv"
    if metrics.is_file():
        number = 1
        while (folder / f"metrics.{number}.csv").exists():
            number += 1
        metrics.rename(folder / f"metrics.{number}.csv")
