"""Where a run was started, which the relative paths in its files are relative to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

CONFIG = "config.yaml"
ROOT = "runs"
"""Folder of run folders where trainer.default_root_dir names no other."""


def run_start(folder: Path) -> Path | None:
    """The directory that a run was started in; None where its folder does not tell.

    It tells by its place, so that a directory can be moved with its runs: ROOT/STEM/NUMBER below the start, where ROOT
    is trainer.default_root_dir, relative, or "runs".

    Args:
        folder: a run folder, or one in it, such as its adapter.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - without "..", and with links as they are
    run = next((place for place in (folder, folder.parent) if (place / CONFIG).is_file()), None)
    if run is None:
        return None
    try:
        settings = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        root = Path(settings["trainer"].get("default_root_dir") or ROOT)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return None
    start = run.parent.parent
    for part in reversed(root.parts):
        if start.name != part:  # which an absolute root never has as its first
            return None
        start = start.parent
    return start


def from_start(name: str, folder: Path) -> str:
    """`name`; where it means nothing here, and a file or folder where the run in `folder` was started, that one's path.

    Args:
        name: a path, or what else a setting may hold.
        folder: a run folder, or one in it.
    """
    if not name or _is_there(Path(name)):
        return name
    start = run_start(folder)
    there = None if start is None else start / name
    return str(there) if there is not None and _is_there(there) else name


def _is_there(path: Path) -> bool:
    """Whether a path leads to something; what is too long for a name, such as a random model's, leads nowhere."""
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def paths_from_start(given: Any, folder: Path) -> Any:
    """The same for each text of a list, and each key of a mapping."""
    if isinstance(given, str):
        return from_start(given, folder)
    if isinstance(given, list):
        return [paths_from_start(one, folder) for one in given]
    if isinstance(given, dict):
        return {from_start(str(name), folder): value for name, value in given.items()}
    return given
