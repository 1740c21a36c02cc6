"""Sources of each split, and the fraction of the training data that is held out for validation."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from lora_lightning.data.sources.faults import Faults, RowError
from lora_lightning.data.sources.lines import PLAIN, Reading
from lora_lightning.data.sources.opened import same_files
from lora_lightning.data.sources.stored import PLACE
from lora_lightning.data.sources.tables import UNREADABLE, read_stream, read_table, require_columns, stream_columns
from lora_lightning.data.sources.texts import as_text, declared_names, distinct_rows, names_only, texts_only
from lora_lightning.data.sources.unread import Changing, Unread
from lora_lightning.errors import DataError, SettingsError

log = logging.getLogger(__name__)

Judge = Callable[[Mapping[str, Any]], object]
"""Raises `RowError` for a row that cannot be used."""


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
    how: Reading = PLAIN
    """How files are read."""
    validation_fraction: float = 0.0
    streaming: bool = False
    """Whether the training data are read while training."""
    held_out_rows: int = 0
    """Most rows that are held out of a stream."""
    ignore: tuple[str, ...] = ()
    """Columns that are taken away as they are read."""
    faults: Faults = dataclasses.field(default_factory=Faults, compare=False)
    """Rows that cannot be used; filled while reading."""
    declared: dict[str, list[str]] = dataclasses.field(default_factory=dict, compare=False)
    """Class names in the order of their numbers, by column, where a table declares them; filled while reading."""
    named: set[tuple[str, ...]] = dataclasses.field(default_factory=set, compare=False)
    """Columns that were named as unread, each time behind the source they stand in."""

    def __post_init__(self) -> None:
        for field in ("train", "validation", "test", "predict"):
            source = getattr(self, field)
            several = isinstance(source, dict | list)
            if several and not source:
                raise SettingsError(f"{self.owner}.{field} is {source!r}; it must name a source, or be null.")
            if isinstance(source, dict) and min(source.values()) <= 0:
                raise SettingsError(f"{self.owner}.{field} is {source!r}; weights must be above 0.")
        for field in ("validation", "test"):
            for name in same_files(_named(self.train), _named(getattr(self, field))):
                told = f"{name} is a file of train and of {field}, so that what is measured has been learned"
                log.warning("%s: %s", self.owner, told)

    def column_names(self, split: str) -> list[str] | None:
        """Columns that all sources of a split have, or None where none is named."""
        field = self._field(split)
        if self.streaming and field == "train":
            streams = self._streams()
            return _common([stream_columns(stream, name) for name, stream in streams.items()]) if streams else None
        tables = self._tables(field) if field else {}
        names = [[name for name in table.column_names if name != PLACE] for table in tables.values()]
        return _common(names) if names else None

    def read(
        self,
        split: str,
        columns: Mapping[str, str],
        *,
        texts: Sequence[str],
        hold_out_by: Sequence[str],
        judge: Judge | None = None,
        judged: Sequence[str] = (),
        changing: Mapping[str, Changing] | None = None,
    ) -> Any:
        """Rows of a split, or None where no source is named: a table, or a stream of training data if so asked.

        Weighted sources of the training data are mixed: each row comes from a source with a probability after its
        weight, until every row of all of them has come; those of a source that ends before come again. Elsewhere
        sources follow one another, each row once. A column that one of them lacks is empty there; one that has
        several types is text. The column `PLACE` tells where each row stands.

        Args:
            split: "train", "validation", "test" or "predict".
            columns: Columns that must exist, by the setting that names them.
            texts: Columns in which every row must have a text; whatever else they hold is made text.
            hold_out_by: Columns whose hash decides what is held out; rows equal in them stay on one side.
            judge: Raises `RowError` for further rows that cannot be used; not asked of streams.
            judged: Columns of the rows that `judge` gets.
            changing: Columns that would change what is learned where they are not read, beside weights and masks.

        Raises:
            DataError: the source or a column is missing, a row cannot be used (unless such rows are left out), or
                sources have columns of one name that cannot be joined.
        """
        field = self._field(split)
        used = {*columns.values(), *texts, *hold_out_by, *judged}

        def unread(names: Sequence[str]) -> Unread:
            return Unread.of(self.owner, names, used, changing or {}, split != "predict")

        if self.streaming and field == "train":
            stream = self._stream(split, columns, texts, hold_out_by, unread)
            return stream if split == "train" or stream is None else self._first_rows(stream, split)
        tables = self._tables(field) if field else {}
        if field is None or not tables:
            return None
        for source, table in tables.items():
            require_columns(table, source, columns)
            for name in judged:
                if names := declared_names(table.features[name]):
                    self.declared.setdefault(name, names)
                    table = names_only(table, name)
            beside = unread(table.column_names)
            judges: list[tuple[Judge, list[str]]] = [(beside, list(beside.columns))] if beside.columns else []
            judges += [] if judge is None else [(judge, list(judged))]
            tables[source] = self._usable(field, source, texts_only(table, texts), texts, judges)
            self._name(beside, source)
        if field == "train" and self.validation is None and self.validation_fraction:
            whole, rows = tables, sum(map(len, tables.values()))
            tables = {name: self._part(table, split, hold_out_by) for name, table in tables.items()}
            if not sum(map(len, tables.values())):
                differ = distinct_rows(whole.values(), hold_out_by, identity)
                same = f", of which {differ} differ and equal ones stay together," if differ < rows else ""
                raise DataError(
                    f"{self.owner}.validation_fraction is {self.validation_fraction}; of the {rows} training rows{same}"
                    f" it leaves none for {split}. Name validation data, or set it to 0 to train without."
                )
        weights = getattr(self, field)
        return self._joined(field, tables, weights if split == "train" and isinstance(weights, dict) else None)

    def _tables(self, field: str) -> dict[str, datasets.Dataset]:
        given, hub_split = getattr(self, field), "test" if field == "predict" else field
        what = f"{self.owner}.{field}"
        return {
            source: self._without_ignored(
                undecoded_table(read_table(source, hub_split, self.how, field=what, faults=self.faults))
            )
            for source in _named(given)
        }

    def _streams(self) -> dict[str, datasets.IterableDataset]:
        what = f"{self.owner}.train"
        streams = {s: read_stream(s, "train", self.how, field=what, faults=self.faults) for s in _named(self.train)}
        return {source: self._without_ignored(stream) for source, stream in streams.items()}

    def _without_ignored(self, table: Any) -> Any:
        """A table or a stream without the columns that are not to be read."""
        there = [name for name in self.ignore if name in (table.column_names or ())]
        return table.remove_columns(there) if there else table

    def _name(self, unread: Unread, source: str) -> None:
        """Name the columns once that change nothing in any row."""
        names = tuple(unread.columns)
        if names and (source, *names) not in self.named:
            self.named.add((source, *names))
            told = f"{Path(source).name}: columns that change nothing are not read: {', '.join(names)}"
            log.warning("%s: %s", self.owner, told)

    def _stream(
        self,
        split: str,
        columns: Mapping[str, str],
        texts: Sequence[str],
        hold_out_by: Sequence[str],
        unread: Callable[[Sequence[str]], Unread],
    ) -> datasets.IterableDataset | None:
        """The training data, or what is held out of them, as a stream; a missing text is found when it is read."""
        streams = self._streams()
        for source, stream in streams.items():
            require_columns(stream, source, columns)
        if not streams:
            return None
        names = _union([stream_columns(stream, name) for name, stream in streams.items()])
        beside = unread(names)
        rows = [
            stream.map(StreamedRow(self.faults, source, tuple(texts), tuple(names), beside)).select_columns(
                [*names, UNREADABLE, PLACE]
            )
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
        held_out = [self._is_held_out(row) for row in zip(*(table[name][:] for name in hold_out_by), strict=True)]
        return table.select([row for row, held in enumerate(held_out) if held == (split != "train")])

    def _joined(
        self, field: str, tables: Mapping[str, datasets.Dataset], weights: Mapping[str, float] | None
    ) -> datasets.Dataset:
        parts = {name: table for name, table in tables.items() if len(table)}
        if len(parts) == 1:
            return next(iter(parts.values()))
        rows = _aligned(list(parts.values()))
        try:
            if weights is None:
                return datasets.concatenate_datasets(rows)
            total = sum(weights[name] for name in parts)
            probabilities = [weights[name] / total for name in parts]
            return datasets.interleave_datasets(rows, probabilities, seed=0, stopping_strategy="all_exhausted")
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{self.owner}.{field}: its sources do not fit together: {reason}") from error

    def _usable(
        self,
        field: str,
        source: str,
        table: datasets.Dataset,
        texts: Sequence[str],
        judges: Sequence[tuple[Judge, list[str]]],
    ) -> datasets.Dataset:
        """`table` without the rows that cannot be used.

        Raises:
            DataError: one of them, or a column without any text.
        """
        left_out: set[int] = set()
        places = [int(place) for place in table[PLACE][:]]

        def fault(row: int, kind: str, reason: str) -> None:
            left_out.add(row)
            self.faults.add(field, places[row], kind, reason)

        for name in texts:
            column = table[name][:]
            for row, text in enumerate(column):
                if text is None:
                    fault(row, f'without "{name}"', f'"{name}" is missing')
            if not any(text and text.strip() for text in column):
                raise DataError(f'{Path(source).name}: "{name}" is blank in every row.')
        for judge, columns in judges:
            for row, values in enumerate(_rows(table.select_columns(columns))):
                if row not in left_out:
                    try:
                        judge(values)
                    except RowError as found:
                        fault(row, found.kind, str(found))
        if len(left_out) == len(table):
            raise DataError(f"{self.owner}.{field}: no row of {source} is left: {self.faults.told(field)}.")
        return table.select([row for row in range(len(table)) if row not in left_out]) if left_out else table

    def _is_held_out(self, texts: Sequence[object]) -> bool:
        return in_fraction(" ".join(map(identity, texts)), self.validation_fraction)

    def folder(self, split: str) -> Path | None:
        """Where the one file lies that the rows of a split are read from; paths in it are relative to that."""
        field = self._field(split)
        source = getattr(self, field) if field else None
        path = Path(source).expanduser() if isinstance(source, str) else None
        return path.parent if path and path.is_file() else None

    def fault(self, split: str, place: int | None, fault: RowError) -> None:
        """Leave a row out that turned out to be of no use later, and count it, unless faults are errors.

        Raises:
            DataError: they are.
        """
        place = self.faults.places.start(split, "row") if place is None else place
        self.faults.add(self._field(split) or split, place, fault.kind, str(fault))

    def told(self, split: str) -> str:
        """Rows of the source of a split that were left out, by kind."""
        return self.faults.told(self._field(split) or split)

    def _field(self, split: str) -> str | None:
        """The setting that names the source of `split`: its own, or for validation and predict the next best."""
        held_out = "train" if self.validation_fraction else None
        validation = "validation" if self.validation else held_out
        if split == "validation":
            return validation
        if split == "predict" and not self.predict:
            return "test" if self.test else validation
        return split


def undecoded_table(table: datasets.Dataset) -> datasets.Dataset:
    """`table` with images and sounds that are read when they are used, not when they are looked at."""
    for name, feature in (getattr(table, "features", None) or {}).items():
        plain = _undecoded(feature)
        if plain != feature:
            table = table.cast_column(name, plain)
    return table


def _undecoded(feature: Any) -> Any:
    """The feature with images and sounds, in lists and structures too, as bytes and path."""
    if isinstance(feature, datasets.Image | datasets.Audio):
        return dataclasses.replace(feature, decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    return feature


@dataclass(frozen=True)
class StreamedRow:
    """Rows of a stream with texts in their columns, a place, and in `UNREADABLE` why one cannot be used, else None."""

    faults: Faults
    source: str
    texts: tuple[str, ...]
    names: tuple[str, ...]
    unread: Unread

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row.

        Raises:
            DataError: it cannot be used, and such rows are errors.
        """
        place, reason = row.get(PLACE), row.get(UNREADABLE)
        made = {name: row.get(name) for name in self.names} | {name: as_text(row.get(name)) for name in self.texts}
        missing = next((name for name in self.texts if made[name] is None), None)
        if reason is None and missing is not None:
            reason = f'"{missing}" is missing'
        try:
            self.unread(row)
        except RowError as found:
            reason = reason or str(found)
        if reason is None:
            return {**made, UNREADABLE: None, PLACE: place}
        where = Path(self.source).name if place is None else self.faults.places.words(place)
        if self.faults.on_error == "raise":
            raise DataError(f"{where}: {reason}. data.on_error: skip leaves such rows out.")
        return {**made, UNREADABLE: f"{where}: {reason}", PLACE: place}


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


def _named(source: Source | None) -> list[str]:
    return [] if source is None else [source] if isinstance(source, str) else list(source)


def _common(columns: Sequence[Sequence[str]]) -> list[str]:
    """Names that are in every list, in the order of the first."""
    return [name for name in columns[0] if all(name in others for others in columns)]


def _union(columns: Sequence[Sequence[str]]) -> list[str]:
    """Names that are in any list, in the order in which they first come."""
    return list(dict.fromkeys(name for names in columns for name in names))


def _aligned(tables: Sequence[datasets.Dataset]) -> list[datasets.Dataset]:
    """Tables with the columns of all: empty where one has none, and text where theirs have several types."""
    names = _union([table.column_names for table in tables])
    types = {name: {str(table.features[name]) for table in tables if name in table.features} for name in names}
    several = [name for name, found in types.items() if len(found) > 1]
    features = {name: next(table.features[name] for table in tables if name in table.features) for name in names}
    features |= dict.fromkeys(several, datasets.Value("string"))
    made = []
    for table in tables:
        table = texts_only(table, [name for name in several if name in table.column_names])
        for name in names:
            if name not in table.column_names:
                table = table.add_column(name, [None] * len(table), feature=features[name])
        made.append(table.select_columns(names))
    return made


def _rows(table: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Rows of a table, read many at a time."""
    for batch in table.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))
