"""Lines of a text file that hold no row, by number, and a copy of the file without them."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets


@dataclass(frozen=True)
class BadLines:
    """One row that cannot be read."""

    first: int
    """Its first line, counted from 1."""
    last: int
    """Its last line: a quoted field may hold several."""
    reason: str


def bad_lines(path: Path, columns: Sequence[str] | None = None) -> list[BadLines]:
    """The rows of a CSV, TSV, JSON, JSONL or text file that cannot be read; none for other formats.

    Args:
        path: The file.
        columns: Names of the columns of a CSV or TSV file that has no header line.
    """
    if has_lines(path):
        return [row for row in rows_of(path, columns) if isinstance(row, BadLines)]
    return list(_bad_document(path)) if path.suffix.lower() == ".json" else []


def has_lines(path: Path) -> bool:
    """Whether `path` is a file of rows that are lines, so that one of them can be left out."""
    suffix = path.suffix.lower()
    return suffix in READERS and not (suffix == ".json" and _is_document(path))


def rows_of(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any] | BadLines]:
    """The rows of a file that has lines, read one by one, and in the place of each that cannot be read its lines.

    Values of CSV and TSV are texts.

    Args:
        path: The file.
        columns: Names of the columns of a CSV or TSV file that has no header line.
    """
    return READERS[path.suffix.lower()](path, columns)


def copy_without(path: Path, bad: Sequence[BadLines]) -> Path:
    """A copy of `path` without those lines, beside the tables that `datasets` caches; one for one content."""
    out = {number for lines in bad for number in range(lines.first, lines.last + 1)}
    with path.open("rb") as file:
        kept = b"".join(line for number, line in enumerate(file, 1) if number not in out)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lora_lightning" / "readable"
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / f"{hashlib.sha256(kept).hexdigest()}{path.suffix}"
    if not copy.exists():
        mine = copy.with_name(f"{copy.name}.{os.getpid()}")  # other processes may be writing the same
        mine.write_bytes(kept)
        mine.replace(copy)
    return copy


def first_bad_line(sources: Sequence[str]) -> str:
    """The first line that cannot be read in the files, or files of folders, among `sources`; "" where there is none."""
    paths = [Path(source).expanduser() for source in sources]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.*")))]
    found = ((file, bad) for file in files for bad in bad_lines(file))
    return next((f"{file}, line {bad.first}: {bad.reason}" for file, bad in found), "")


def _texts(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any] | BadLines]:  # noqa: ARG001 - one column
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield BadLines(number, number, str(error))
            else:
                if text.strip():
                    yield {"text": text}


def _objects(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any] | BadLines]:  # noqa: ARG001 - each names its own
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:  # no JSON, or no UTF-8
                yield BadLines(number, number, str(error))
            else:
                is_row = isinstance(value, dict)
                yield (
                    value if is_row else BadLines(number, number, f"a {type(value).__name__}, not an object of columns")
                )


def _is_document(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1000).lstrip()[:1] == b"["


def _bad_document(path: Path) -> Iterator[BadLines]:
    try:
        json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        yield BadLines(error.lineno, error.lineno, str(error))


def _records(path: Path, columns: Sequence[str] | None = None, **dialect: Any) -> Iterator[dict[str, Any] | BadLines]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader, end = csv.reader(file, **dialect), 0
        names, width = columns, len(columns) if columns is not None else None
        for record in reader:
            first, end = end + 1, reader.line_num
            width = len(record) if width is None else width
            reason = _undecodable(record)
            if not reason and len(record) > width:
                reason = f"{len(record)} fields where there are {width} columns"
            if reason:
                yield BadLines(first, end, reason)
            elif names is None:
                names = record
            elif record:
                yield dict(zip(names, record, strict=False))


def _undecodable(fields: Sequence[str]) -> str:
    """Why a field that was read byte by byte is no UTF-8."""
    try:
        "".join(fields).encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        return str(error)
    return ""


READERS: dict[str, Callable[..., Iterator[dict[str, Any] | BadLines]]] = {
    ".csv": _records,
    ".tsv": partial(_records, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".txt": _texts,
    ".jsonl": _objects,
    ".json": _objects,
}
"""What reads the lines of a file, by suffix."""
