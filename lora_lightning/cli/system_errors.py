"""What the operating system refuses, in one line: a full disk, a name too long, a folder that went away."""

from __future__ import annotations

import errno
import os

from lora_lightning.errors import LoraLightningError

DEBUG = "LORA_LIGHTNING_DEBUG"
"""Environment variable with which such an error, and one of a plugin's verb, comes with its traceback."""
_SHOWN = 120
"""Letters of a path that are shown."""
_HELP = {
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ENOSPC: "Make room, or write elsewhere.",
    errno.EDQUOT: "Make room, or write elsewhere.",
    errno.EFBIG: "Allow larger files (ulimit -f), or write elsewhere.",
    errno.EACCES: "Change its permissions, or name another place.",
    errno.EPERM: "Change its permissions, or name another place.",
    errno.EROFS: "Name a place that can be written.",
    errno.ENOENT: "It is not there, or was removed meanwhile; look whether the path is right.",
    errno.EISDIR: "Name a file.",
    errno.ENOTDIR: "A part of the path is a file; name a folder.",
    errno.ELOOP: "Its links lead in a circle; name the file itself.",
    errno.EMFILE: "Allow more open files (ulimit -n), or set data.num_workers to 0.",
    errno.ENOMEM: "Free memory, or take smaller batches.",
}


def system_error(error: BaseException) -> LoraLightningError | None:
    """One line for an error of the operating system.

    Args:
        error: any error.

    Returns:
        None where it is another error, a pipe that nobody reads any more, or where the traceback is asked for.
    """
    if not isinstance(error, OSError) or error.errno is None or isinstance(error, BrokenPipeError):
        return None
    if os.environ.get(DEBUG):
        return None
    place = str(error.filename or "")
    shown = place if len(place) <= _SHOWN else f"{place[:_SHOWN]}..."
    where = f'"{shown}": ' if shown else ""
    reason = error.strerror or os.strerror(error.errno)
    help_text = _HELP.get(error.errno, "")
    return LoraLightningError(
        f"{where}{reason}.{' ' if help_text else ''}{help_text} (The environment variable {DEBUG}=1 brings the "
        "traceback.)"
    )
