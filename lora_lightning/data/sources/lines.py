"""Rows of CSV, TSV, JSON, JSONL and text files, one by one, each with its line in the file.

A cell of CSV and TSV is the text that stands in the file. Libraries guess types from the first rows, so that 02134
becomes 2134; they number records where fields hold several lines, and drop or merge what does not fit.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.data.sources.opened import encoding_of, foreign_byte, open_text, suffix_of
from lora_lightning.data.sources.texts import Literal, integer
from lora_lightning.errors import DataError

Row = dict[str, Any]
SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""What stands between fields, by suffix."""
OTHERS = ";\t|,"
"""Separators that a header is looked through for."""
LINE_FORMATS = (*SEPARATORS, ".json", ".jsonl", ".ndjson", ".txt")


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    columns: tuple[str, ...] | None = None
    """Names of the columns of CSV and TSV files that have no header line."""
    encoding: str | None = None
    """Encoding of text files; None for what the byte order mark tells, else UTF-8."""
    separator: str | None = None
    """What stands between the fields of CSV and TSV files; None for a comma and a tab."""


PLAIN = Reading()
"""What suffix and byte order mark tell."""


@dataclass(frozen=True)
class Numbered:
    """One row and where it stands."""

    line: int
    """Its first line, counted from 1; in a JSON document on one line its number among the rows, counted from 0."""
    row: Row


@dataclass(frozen=True)
class BadLines:
    """One row that cannot be read."""

    first: int
    """Its first line, counted from 1."""
    last: int
    """Its last line: a quoted field may hold several."""
    reason: str
    kind: str = "cannot be read"
    """The reason in the words that faults are counted by."""


def has_lines(path: Path) -> bool:
    """Whether `path` is of a format that is read here."""
    return suffix_of(path) in LINE_FORMATS


def rows_of(path: Path, how: Reading = PLAIN) -> Iterator[Numbered | BadLines]:
    """The rows of a file, and in the place of each that cannot be read its lines.

    Args:
        path: The file.
        how: Columns, encoding and separator.

    Raises:
        DataError: the file as a whole cannot be read: another encoding, a broken archive, columns of one name.
    """
    suffix = suffix_of(path)
    try:
        encoding = encoding_of(path, how.encoding)
        if suffix in SEPARATORS:
            yield from _records(path, encoding, how, suffix)
        elif suffix == ".txt":
            yield from _texts(path, encoding)
        elif suffix == ".json" and is_document(path, how):
            yield from _document(path, encoding)
        else:
            yield from _objects(path, encoding)
    except UnicodeError as error:
        raise DataError(
            f"{path.name} cannot be read as text: {error}. Set data.encoding to the file's encoding."
        ) from error
    except (EOFError, OSError) as error:  # a broken or truncated archive
        raise DataError(f"{path.name} cannot be read: {error}") from error


def is_document(path: Path, how: Reading = PLAIN) -> bool:
    """Whether a .json file is one list or object, not a row a line."""
    encoding = encoding_of(path, how.encoding)
    with open_text(path, encoding, "\n") as file:
        first = next((line for line in file if line.strip()), "").strip()
    if first.startswith("["):
        return True
    try:
        _parsed(first)
    except ValueError:
        with open_text(path, encoding, "\n") as file:
            start = file.read(2000).split()
        return start[:1] == ["{"]  # an object over several lines
    return False


def lone_separator(names: Sequence[str], separator: str = "") -> str:
    """The separator that a single column's name shows, and is not what was split by; "" where there is none."""
    if len(names) != 1:
        return ""
    return next((mark for mark in OTHERS if mark in names[0] and mark != separator), "")


def _texts(path: Path, encoding: str) -> Iterator[Numbered | BadLines]:
    with open_text(path, encoding, "\n") as file:
        for number, line in enumerate(file, 1):
            text = line.rstrip("\r\n")
            if reason := foreign_byte(text, encoding):
                yield BadLines(number, number, reason, "in another encoding")
            elif text.strip():
                yield Numbered(number, {"text": text})


def _objects(path: Path, encoding: str) -> Iterator[Numbered | BadLines]:
    with open_text(path, encoding, "\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if reason := foreign_byte(line, encoding):
                yield BadLines(number, number, reason, "in another encoding")
                continue
            try:
                yield Numbered(number, _row(_parsed(line.strip())))
            except json.JSONDecodeError as error:
                yield BadLines(number, number, f"{error.msg} in column {error.colno}", "no JSON object")
            except ValueError as error:
                yield BadLines(number, number, str(error), "no JSON object")


def _document(path: Path, encoding: str) -> Iterator[Numbered | BadLines]:
    with open_text(path, encoding, "") as file:
        text = file.read()
    if reason := foreign_byte(text, encoding):
        yield BadLines(1, text.count("\n") + 1, reason, "in another encoding")
        return
    start, line = len(text) - len(text.lstrip()), 1
    if text[start : start + 1] != "[":
        yield from _columns(text, path)
        return
    lines = "\n" in text.strip()
    position, line, number = start + 1, text.count("\n", 0, start) + 1, 0
    try:
        while True:
            place = _behind_blanks(text, position)
            if text[place : place + 1] == "]" and not number:
                return
            line += text.count("\n", position, place)
            value, end = DECODER.raw_decode(text, place)
            yield _one(value, line if lines else number)
            number += 1
            after = _behind_blanks(text, end)
            line += text.count("\n", place, after)
            if text[after : after + 1] == "]":
                return
            if text[after : after + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, after)
            position = after + 1
    except json.JSONDecodeError as error:
        yield BadLines(error.lineno, error.lineno, str(error), "no JSON")
    except ValueError as error:
        yield BadLines(line, line, str(error), "no JSON object")


def _one(value: Any, line: int) -> Numbered | BadLines:
    try:
        return Numbered(line, _row(value))
    except ValueError as error:
        return BadLines(line, line, str(error), "no JSON object")


def _columns(text: str, path: Path) -> Iterator[Numbered | BadLines]:
    """Rows of an object that holds a list for each column."""
    try:
        value = _parsed(text)
    except json.JSONDecodeError as error:
        yield BadLines(error.lineno, error.lineno, str(error), "no JSON")
        return
    lists = isinstance(value, dict) and all(isinstance(column, list) for column in value.values())
    if not lists or len({len(column) for column in value.values()}) != 1:
        keys = ", ".join(list(value)[:8]) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{path.name} is one object ({keys}); it must be a list of rows, or hold one row a line.")
    for number, cells in enumerate(zip(*value.values(), strict=True)):
        yield Numbered(number, dict(zip(value, cells, strict=True)))


def _behind_blanks(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{twice}" stands twice in one object')
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_no_key_twice, parse_float=Literal, parse_int=integer)


def _parsed(text: str) -> Any:
    value = DECODER.decode(text)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("half of a surrogate pair, which is no letter") from error
    return value


def _row(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object of columns")
    return value


def _records(path: Path, encoding: str, how: Reading, suffix: str) -> Iterator[Numbered | BadLines]:
    separator = how.separator or SEPARATORS[suffix]
    # quotes are letters of a TSV file, unless its separator was set, which means that it is another kind of table
    plain = suffix == ".tsv" and how.separator is None
    csv.field_size_limit(sys.maxsize)
    names = how.columns
    with open_text(path, encoding, "") as file:
        # strict: a quote inside a field or one that is never closed would change texts or swallow rows
        reader = csv.reader(
            file, delimiter=separator, quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL, strict=True
        )
        end = 0
        while True:
            first = end + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                end = reader.line_num
                yield BadLines(first, end, _quotes(str(error), end - first), "with quotes that do not fit")
                continue
            end = reader.line_num
            if not record:
                continue
            if reason := foreign_byte("".join(record), encoding):
                yield BadLines(first, end, reason, "in another encoding")
            elif names is None:
                names = _header(record, path)
            elif any(record[len(names) :]):
                yield BadLines(first, end, _too_many(record, names, separator), "with more fields than columns")
            else:
                yield Numbered(first, dict(zip(names, [*record, *[None] * len(names)], strict=False)))


def _too_many(record: Sequence[str], names: Sequence[str], separator: str) -> str:
    """What is wrong with a record that has more fields than there are columns, and the setting that helps."""
    other = lone_separator(names, separator)
    hint = f'; if the fields are separated by "{other}", set data.separator to it' if other else ""
    return f"{len(record)} fields where there are {len(names)} columns{hint}"


def _header(record: Sequence[str], path: Path) -> tuple[str, ...]:
    names = tuple(name or f"Unnamed: {number}" for number, name in enumerate(record))
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f'{path.name}: two columns are called "{twice[0]}"; rename one of them.')
    return names


def _quotes(error: str, lines: int) -> str:
    """What is wrong with the quotes of a record that goes on for so many further lines."""
    if "unexpected end" in error:
        where = "is never closed"
    else:
        where = f"is closed within a field{f', {lines} lines on' if lines else ''}"
    return f"a quote that opens here {where}; quotes inside a quoted field are doubled"
