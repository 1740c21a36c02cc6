"""Lines of a text file that hold no row, by number, and a copy of the file without them."""

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
    find: dict[str, Callable[[], Iterator[BadLines]]] = {
        ".csv": lambda: _bad_records(path, columns, {}),
        ".tsv": lambda: _bad_records(path, columns, {"delimiter": "\t", "quoting": csv.QUOTE_NONE}),
        ".txt": lambda: _bad_texts(path),
        ".jsonl": lambda: _bad_objects(path),
        ".json": lambda: _bad_document(path) if path.read_bytes().lstrip()[:1] == b"[" else _bad_objects(path),
    }
    return list(find.get(path.suffix.lower(), lambda: iter(()))())


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


def _bad_texts(path: Path) -> Iterator[BadLines]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                yield BadLines(number, number, str(error))


def _bad_objects(path: Path) -> Iterator[BadLines]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:  # no JSON, or no UTF-8
                yield BadLines(number, number, str(error))
            else:
                if not isinstance(value, dict):
                    yield BadLines(number, number, f"a {type(value).__name__}, not an object of columns")


def _bad_document(path: Path) -> Iterator[BadLines]:
    try:
        json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        yield BadLines(error.lineno, error.lineno, str(error))


def _bad_records(path: Path, columns: Sequence[str] | None, dialect: dict[str, Any]) -> Iterator[BadLines]:
    undecodable = {bad.first: bad.reason for bad in _bad_texts(path)}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader, end = csv.reader(file, **dialect), 0
        width = len(columns) if columns is not None else None
        for record in reader:
            first, end = end + 1, reader.line_num
            width = len(record) if width is None else width
            reasons = [undecodable[number] for number in range(first, end + 1) if number in undecodable]
            if len(record) > width:
                reasons.append(f"{len(record)} fields where there are {width} columns")
            if reasons:
                yield BadLines(first, end, reasons[0])
