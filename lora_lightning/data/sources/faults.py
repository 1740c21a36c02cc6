"""Where rows stand in their files, and what becomes of those that cannot be used."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_lightning.errors import DataError

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
BITS = 40
"""Of a place, the low bits that count rows; those above tell the file."""


class RowError(DataError):
    """A row that cannot be used: an error, or left out and counted.

    Args:
        kind: The reason in the words that faults are counted by, such as "an unknown role".
        message: What is wrong with this one.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Places:
    """Files by number, and the places of rows in them: one number tells the file and the line."""

    files: list[tuple[str, str]] = field(default_factory=list)
    """Name of each file, and what its rows are counted in: "line", or "row" from 0."""

    def start(self, name: str, unit: str) -> int:
        """The place of row 0 of a file; a row's own number is added to it."""
        if (name, unit) not in self.files:
            self.files.append((name, unit))
        return self.files.index((name, unit)) << BITS

    def folder(self, place: int) -> Path | None:
        """The folder that the file of a place lies in, or that it is; None where the name is neither's."""
        path = Path(self.files[place >> BITS][0]).expanduser()
        return path.parent if path.is_file() else path if path.is_dir() else None

    def words(self, place: int) -> str:
        """A place as people read it: "train.csv, line 5"."""
        name, unit = self.files[place >> BITS]
        short = Path(name).name
        if sum(Path(other).name == short for other, _ in self.files) > 1:  # a/train.csv and b/train.csv
            short = name
        number = place & ((1 << BITS) - 1)
        return f"{short}, {unit} {number}" + (" (counted from 0)" if unit == "row" else "")


@dataclass
class Faults:
    """Rows that cannot be used: the first one is an error, or all are left out and counted.

    Args:
        on_error: "raise" or "skip".
    """

    on_error: OnError = "raise"
    places: Places = field(default_factory=Places)
    found: dict[str, dict[str, set[int]]] = field(default_factory=dict)
    """Places by setting that names the source, and kind."""

    def add(self, field: str, place: int, kind: str, reason: str, setting: str = "") -> None:
        """Count a row as left out; one that was counted before is counted once.

        Args:
            field: The setting that names the source: "train", "validation", "test" or "predict".
            place: Where the row stands.
            kind: The reason in the words that faults are counted by.
            reason: What is wrong.
            setting: What the message begins with.

        Raises:
            DataError: faults are errors.
        """
        where = self.places.words(place)
        if self.on_error == "raise":
            before = f"{setting}: " if setting else ""
            raise DataError(f"{before}{where}: {reason.rstrip('.')}. data.on_error: skip leaves such rows out.")
        known = self.found.setdefault(field, {}).setdefault(kind, set())
        if not known:
            log.warning("left out: %s: %s", where, reason)
        known.add(place)

    def count(self, field: str) -> int:
        """Rows of a source that were left out."""
        return sum(map(len, self.found.get(field, {}).values()))

    def total(self) -> int:
        """Rows of all sources that were left out."""
        return sum(map(self.count, self.found))

    def told(self, field: str) -> str:
        """Rows that were left out by kind, with the line of the first: "2 an unknown role (first: x.jsonl, line 3)"."""
        counts = Counter({kind: len(places) for kind, places in self.found.get(field, {}).items()})
        first = {kind: self.places.words(min(places)) for kind, places in self.found.get(field, {}).items()}
        return ", ".join(f"{count} {kind} (first: {first[kind]})" for kind, count in counts.most_common())
