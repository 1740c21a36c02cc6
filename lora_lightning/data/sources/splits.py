"""Sources of each split, and the fraction of the training data that is held out for validation."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from lora_lightning.data.sources.tables import (
    UNREADABLE,
    OnError,
    read_stream,
    read_table,
    require_columns,
    require_text,
    stream_columns,
)
from lora_lightning.errors import DataError, SettingsError


def folded(text: str) -> str:
    """`text` in one case and with single spaces, so that equal texts compare equal."""
    return " ".join(text.split()).casefold()


def in_fraction(text: str, fraction: float) -> bool:
    """Whether `text` falls into the given fraction of all texts; depends on the folded text alone, on every machine.

    Example:
        >>> sum(in_fraction(f"text {n}", 0.2) for n in range(1000))
        168
    """
    digest = hashlib.sha256(folded(text).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


Source = str | dict[str, float] | list[str]
"""A source, several with weights, or several as they are."""


def identity(value: object) -> str:
    """What tells a text or an image from others: the text; of an image its content, or its name and folder's name."""
    if not isinstance(value, Mapping):
        return str(value)
    content, path = value.get("bytes"), value.get("path")
    return hashlib.sha256(content).hexdigest() if content else "/".join(Path(str(path)).parts[-2:])


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The sources of a data module's splits, as its settings name them.

    Raises:
        SettingsError: several sources without any, or with weights that are not above 0.
    """

    owner: str
    """Class name of the data module, for messages."""
    train: Source | None = None
    validation: Source | None = None
    test: Source | None = None
    predict: Source | None = None
    columns: Sequence[str] | None = None
    validation_fraction: float = 0.0
    on_error: OnError = "raise"
    streaming: bool = False
    """Whether the training data are read while training."""
    held_out_rows: int = 0
    """Most rows that are held out of a stream."""
    skipped: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict, compare=False)
    """Rows that could not be read and were left out, by split and source; filled while reading."""

    def __post_init__(self) -> None:
        for field in ("train", "validation", "test", "predict"):
            source = getattr(self, field)
            several = isinstance(source, dict | list)
            if several and not source:
                raise SettingsError(f"{self.owner}.{field} is {source!r}; it must name a source, or be null.")
            if isinstance(source, dict) and min(source.values()) <= 0:
                raise SettingsError(f"{self.owner}.{field} is {source!r}; weights must be above 0.")

    def column_names(self, split: str) -> list[str] | None:
        """Columns that all sources of a split have, or None where none is named."""
        field = self._field(split)
        if self.streaming and field == "train":
            streams = self._streams()
            return _common([stream_columns(stream, name) for name, stream in streams.items()]) if streams else None
        tables = self._tables(field) if field else {}
        return _common([table.column_names for table in tables.values()]) if tables else None

    def read(self, split: str, columns: Mapping[str, str], *, texts: Sequence[str], hold_out_by: Sequence[str]) -> Any:
        """Rows of a split, or None where no source is named: a table, or a stream of training data if so asked.

        Weighted sources of the training data are mixed: each row comes from a source with a probability after its
        weight, until every row of all of them has come; those of a source that ends before come again. Elsewhere
        sources follow one another, each row once.

        Args:
            split: "train", "validation", "test" or "predict".
            columns: Columns that must exist, by the setting that names them.
            texts: Columns in which every row must have a text.
            hold_out_by: Columns whose hash decides what is held out; rows equal in them stay on one side.

        Raises:
            DataError: the source, a column or a text is missing, or sources have columns of one name and other types.
        """
        field = self._field(split)
        if self.streaming and field == "train":
            stream = self._stream(split, columns, texts, hold_out_by)
            return stream if split == "train" or stream is None else self._first_rows(stream, split)
        tables = self._tables(field) if field else {}
        if field is None or not tables:
            return None
        for source, table in tables.items():
            require_columns(table, source, columns)
            require_text(table, source, texts)
        if field == "train" and self.validation is None and self.validation_fraction:
            rows = sum(map(len, tables.values()))
            tables = {name: self._part(table, split, hold_out_by) for name, table in tables.items()}
            if not sum(map(len, tables.values())):
                raise DataError(
                    f"{self.owner}.validation_fraction is {self.validation_fraction}; of the {rows} training rows it"
                    f" leaves none for {split}. Name validation data, or set it to 0 to train without."
                )
        weights = getattr(self, field)
        return self._joined(field, tables, weights if split == "train" and isinstance(weights, dict) else None)

    def _tables(self, field: str) -> dict[str, datasets.Dataset]:
        given, hub_split = getattr(self, field), "test" if field == "predict" else field
        sources = [] if given is None else [given] if isinstance(given, str) else list(given)
        what = f"{self.owner}.{field}"
        return {
            source: _unread(
                read_table(
                    source,
                    hub_split,
                    columns=self.columns,
                    field=what,
                    on_error=self.on_error,
                    skipped=self.skipped.setdefault(field, {}),
                )
            )
            for source in sources
        }

    def _streams(self) -> dict[str, datasets.IterableDataset]:
        sources = [] if self.train is None else [self.train] if isinstance(self.train, str) else list(self.train)
        what = f"{self.owner}.train"
        return {
            source: read_stream(source, "train", columns=self.columns, field=what, on_error=self.on_error)
            for source in sources
        }

    def _stream(
        self, split: str, columns: Mapping[str, str], texts: Sequence[str], hold_out_by: Sequence[str]
    ) -> datasets.IterableDataset | None:
        """The training data, or what is held out of them, as a stream; a missing text is found when it is read."""
        streams = self._streams()
        for source, stream in streams.items():
            require_columns(stream, source, columns)
        if not streams:
            return None
        names = _common([stream_columns(stream, name) for name, stream in streams.items()])
        rows = [
            stream.map(StreamedRow(source, tuple(texts))).select_columns([*names, UNREADABLE])
            for source, stream in streams.items()
        ]
        if self.validation is None and self.validation_fraction:
            side = HeldOut(self, tuple(hold_out_by), held=split != "train")
            rows = [stream.filter(side) for stream in rows]
        if len(rows) == 1:
            return rows[0]
        if split != "train" or not isinstance(self.train, dict):
            return datasets.concatenate_datasets(rows)
        total = sum(self.train.values())
        probabilities = [self.train[source] / total for source in streams]
        return datasets.interleave_datasets(rows, probabilities, seed=0, stopping_strategy="all_exhausted")

    def _first_rows(self, stream: datasets.IterableDataset, split: str) -> datasets.Dataset:
        """The first rows of what is held out of a stream, as a table."""
        rows = [{k: v for k, v in row.items() if k != UNREADABLE} for row in stream.take(self.held_out_rows)]
        if not rows:
            raise DataError(
                f"{self.owner}.validation_fraction is {self.validation_fraction}; of the streamed rows it leaves none"
                f" for {split}. Name validation data, or set it to 0 to train without."
            )
        return datasets.Dataset.from_list(rows)

    def _part(self, table: datasets.Dataset, split: str, hold_out_by: Sequence[str]) -> datasets.Dataset:
        """What is held out of `table` for validation, or what is left for training."""
        held_out = [self._is_held_out(row) for row in zip(*(table[name] for name in hold_out_by), strict=True)]
        return table.select([row for row, held in enumerate(held_out) if held == (split != "train")])

    def _joined(
        self, field: str, tables: Mapping[str, datasets.Dataset], weights: Mapping[str, float] | None
    ) -> datasets.Dataset:
        parts = {name: table for name, table in tables.items() if len(table)}
        if len(parts) == 1:
            return next(iter(parts.values()))
        names = _common([table.column_names for table in parts.values()])
        rows = [table.select_columns(names) for table in parts.values()]
        try:
            if weights is None:
                return datasets.concatenate_datasets(rows)
            total = sum(weights[name] for name in parts)
            probabilities = [weights[name] / total for name in parts]
            return datasets.interleave_datasets(rows, probabilities, seed=0, stopping_strategy="all_exhausted")
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{self.owner}.{field}: its sources do not fit together: {reason}") from error

    def _is_held_out(self, texts: Sequence[object]) -> bool:
        return in_fraction(" ".join(map(identity, texts)), self.validation_fraction)

    def folder(self, split: str) -> Path | None:
        """Where the one file lies that the rows of a split are read from; paths in it are relative to that."""
        field = self._field(split)
        source = getattr(self, field) if field else None
        path = Path(source).expanduser() if isinstance(source, str) else None
        return path.parent if path and path.is_file() else None

    def _field(self, split: str) -> str | None:
        """The setting that names the source of `split`: its own, or for validation and predict the next best."""
        held_out = "train" if self.validation_fraction else None
        validation = "validation" if self.validation else held_out
        if split == "validation":
            return validation
        if split == "predict" and not self.predict:
            return "test" if self.test else validation
        return split


def _unread(table: datasets.Dataset) -> datasets.Dataset:
    """`table` with images that are read when they are used, not when they are looked at."""
    for name, feature in (getattr(table, "features", None) or {}).items():
        if isinstance(feature, datasets.Image) and feature.decode:
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


@dataclass(frozen=True)
class StreamedRow:
    """Rows of a stream as they are, with `UNREADABLE`, which is None for those that can be read."""

    source: str
    texts: tuple[str, ...]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row.

        Raises:
            DataError: a text is missing.
        """
        reason = row.get(UNREADABLE)
        for column in self.texts:
            if row[column] is None and reason is None:
                raise DataError(f'{Path(self.source).name}: "{column}" is missing in a row: {row}.')
        return {**row, UNREADABLE: reason}


@dataclass(frozen=True)
class HeldOut:
    """Whether a row of a stream is on one side of what is held out; one that cannot be read counts as training data."""

    sources: Sources
    columns: tuple[str, ...]
    held: bool

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Whether the row stays."""
        if row[UNREADABLE] is not None:
            return not self.held
        return self.sources._is_held_out([row[column] for column in self.columns]) == self.held


def _common(columns: Sequence[Sequence[str]]) -> list[str]:
    """Names that are in every list, in the order of the first."""
    return [name for name in columns[0] if all(name in others for others in columns)]
