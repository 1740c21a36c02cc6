"""Lines of a text file that hold no row, by number, and a copy of the file without them.

`datasets`, pandas and pyarrow skip rows of CSV alone. They number records where fields hold several lines, and none
tells the line of a byte that is no UTF-8.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

Row = dict[str, Any]


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
    if path.suffix.lower() == ".json":
        try:
            json.loads(path.read_bytes())
        except json.JSONDecodeError as error:
            return [BadLines(error.lineno, error.lineno, str(error))]
    return []


def has_lines(path: Path) -> bool:
    """Whether `path` is a file of rows that are lines, so that one of them can be left out."""
    suffix = path.suffix.lower()
    if suffix == ".json":  # rows line by line, or one list of them
        with path.open("rb") as file:
            return file.read(1000).lstrip()[:1] != b"["
    return suffix in DIALECTS or suffix in PARSERS


def rows_of(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row | BadLines]:
    """The rows of a file that has lines, read one by one, and in the place of each that cannot be read its lines.

    Values of CSV and TSV are texts.

    Args:
        path: The file.
        columns: Names of the columns of a CSV or TSV file that has no header line.
    """
    suffix = path.suffix.lower()
    if suffix in DIALECTS:
        return _records(path, columns, DIALECTS[suffix])
    return _line_by_line(path, PARSERS[suffix])


def copy_without(path: Path, bad: Sequence[BadLines]) -> Path:
    """A copy of `path` without those lines, beside the tables that `datasets` caches; one for one content."""
    out: set[int] = set()
    for lines in bad:
        out |= set(range(lines.first, lines.last + 1))
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
    for source in sources:
        path = Path(source).expanduser()
        for file in [path] if path.is_file() else sorted(path.rglob("*.*")):
            for bad in bad_lines(file):
                return f"{file}, line {bad.first}: {bad.reason}"
    return ""


def _line_by_line(path: Path, parse: Callable[[bytes], Row | None]) -> Iterator[Row | BadLines]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = parse(line)
            except ValueError as error:  # no JSON, or no UTF-8
                yield BadLines(number, number, str(error))
            else:
                if row is not None:
                    yield row


def _text(line: bytes) -> Row | None:
    text = line.decode().rstrip("\r\n")
    return {"text": text} if text.strip() else None


def _object(line: bytes) -> Row | None:
    if not line.strip():
        return None
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object of columns")
    return value


def _records(path: Path, columns: Sequence[str] | None, dialect: dict[str, Any]) -> Iterator[Row | BadLines]:
    # bytes that are no UTF-8 are read as surrogates, so that the reader gets past them
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader, end, names = csv.reader(file, **dialect), 0, columns
        for record in reader:
            first, end = end + 1, reader.line_num
            if reason := _problem(record, len(record) if names is None else len(names)):
                yield BadLines(first, end, reason)
            elif names is None:
                names = record
            elif record:
                yield dict(zip(names, record, strict=False))


def _problem(record: Sequence[str], width: int) -> str:
    """Why a record is no row of `width` columns; "" for one that is."""
    try:
        "".join(record).encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        return str(error)
    return f"{len(record)} fields where there are {width} columns" if len(record) > width else ""


DIALECTS: dict[str, dict[str, Any]] = {".csv": {}, ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}
"""How fields are written, by suffix."""
PARSERS = {".txt": _text, ".jsonl": _object, ".json": _object}
"""What makes a row of a line, by suffix; None for an empty line."""
