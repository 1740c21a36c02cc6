"""What a resumed run compares of its training data: the rows, and the settings that make examples of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets

from lora_lightning.data.sources.splits import identity
from lora_lightning.data.sources.stored import PLACE
from lora_lightning.registry import arguments

_SERVING = {
    "batch_size",  # the batches of a step are counted by whoever resumes
    "cache",
    "ignore",
    "num_workers",
    "on_error",
    "predict",
    "processor",
    "test",
    "tokenizer",
    "train",  # what it holds counts, not its place
    "validation",
    "validation_batch_size",
}
"""Settings on which what is learned does not depend."""
_EDGE = 1 << 16
"""Bytes of each end of a streamed file that count."""


def settings_of(data: object) -> dict[str, Any]:
    """Settings of a data module on which its examples and their order depend, by class and name."""
    names = [name for name in arguments(type(data)) if name not in _SERVING and hasattr(data, name)]
    plain = {f"{type(data).__name__}.{name}": json.dumps(getattr(data, name), default=str) for name in names}
    template = getattr(data.__dict__.get("tokenizer_object"), "chat_template", None)
    if not template:
        return plain
    plain.pop(f"{type(data).__name__}.chat_template", None)  # what it holds counts, not its name or place
    return plain | {"chat template": _short(hashlib.sha256(str(template).encode()))}


def rows_digest(rows: datasets.Dataset) -> str:
    """The number of rows, and a hash of what they hold; where a row or an image's file lies is none of it."""
    rows = rows.remove_columns([PLACE] if PLACE in rows.column_names else [])
    images = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    digest = hashlib.sha256(json.dumps(sorted(rows.column_names)).encode())
    for name in images:
        for value in rows.cast_column(name, datasets.Image(decode=False))[name]:
            digest.update(identity(value).encode())
    rest = rows.remove_columns(images)
    for batch in rest.with_format("python").iter(batch_size=1000) if rest.column_names else ():
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return f"{len(rows):,} rows, {_short(digest)}"


def files_digest(sources: Iterable[str]) -> str:
    """A hash of the names of streamed sources, and of the sizes and the ends of those that lie here."""
    digest = hashlib.sha256()
    for source in sources:
        path = Path(source).expanduser()
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            digest.update(file.name.encode())
            if file.is_file():
                digest.update(_ends(file))
    return f"streamed, {_short(digest)}"


def source_names(source: str | Mapping[str, float] | Iterable[str] | None) -> list[str]:
    """The names of one source or of several."""
    return [source] if isinstance(source, str) else list(source or ())


def _ends(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as handle:
        first = handle.read(_EDGE)
        handle.seek(max(0, size - _EDGE))
        return str(size).encode() + first + handle.read(_EDGE)


def _short(digest: Any) -> str:
    return f"digest {digest.hexdigest()[:16]}"
