"""JSON files that a callback has written, read back: each names its format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lora_lightning.errors import DataError

T = TypeVar("T")


def content_of(file: Path, kind: str, writer: str, name: str, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of a JSON file of one format, which `writer` writes under `name`.

    Raises:
        DataError: missing, damaged, or another kind of file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f'"{file}" does not exist; {writer} writes {name} into a run folder.') from error
    except (OSError, ValueError) as error:
        raise DataError(f'"{file}" cannot be read: {error}.') from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise DataError(f'"{file}" was not written by {writer}: it lacks "format": "{kind}".')
    try:
        return parse(content)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DataError(f'"{file}" is damaged: {type(error).__name__} {error}.') from error
