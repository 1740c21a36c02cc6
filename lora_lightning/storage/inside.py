"""Reading a folder from elsewhere: files inside it, never what a link in it leads to outside."""

from __future__ import annotations

from pathlib import Path

from lora_lightning.errors import AdapterFileError
from lora_lightning.storage.atomic import read_regular


def read_inside(folder: Path, name: str) -> bytes:
    """The content of a file of a folder.

    Args:
        folder: the folder; may be a link itself.
        name: of the file in it, "/" between folders.

    Raises:
        AdapterFileError: it is a link out of the folder, no regular file, or cannot be read.
    """
    path = folder / name
    try:
        return read_regular(_real(folder, path))
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise AdapterFileError(f'"{path}" cannot be read: {getattr(error, "strerror", None) or error}.') from error


def shortened(path: Path, start: Path) -> Path:
    """A path as it is printed: as seen from a folder that it lies in, else unchanged."""
    return path.relative_to(start) if path.is_relative_to(start) else path


def names_inside(folder: Path, name: str) -> list[str]:
    """Names of the files in a folder of a folder, hidden ones and folders left out; none where there is no such one.

    Raises:
        AdapterFileError: it is a link out of the folder, or cannot be listed.
    """
    path = folder / name
    try:
        entries = list(_real(folder, path).iterdir())
        return sorted(entry.name for entry in entries if not (entry.name.startswith(".") or entry.is_dir()))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, RuntimeError) as error:
        raise AdapterFileError(f'"{path}" cannot be listed: {getattr(error, "strerror", None) or error}.') from error


def _real(folder: Path, path: Path) -> Path:
    """`path` without links, which must not lead out of the folder."""
    real = path.resolve(strict=True)
    if not real.is_relative_to(_home(folder)):
        raise AdapterFileError(
            f'"{path}" is a link out of its folder, to "{real}", which is not followed. Put a copy in its place if it '
            "belongs there."
        )
    return real


def _home(folder: Path) -> Path:
    """Where files of a folder may lie: in it, or, of a snapshot in the Hugging Face cache, in that repository."""
    real = folder.resolve()
    for above in real.parents:
        blobs = above.parent / "blobs"
        if above.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            return above.parent
    return real
