"""Read one table of examples from a file, a folder or the hub, and check its columns and texts."""

from __future__ import annotations

import csv
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import datasets

from lora_lightning.data.sources.builtin import PREFIX, builtin_table
from lora_lightning.data.sources.lines import BadLines, bad_lines, copy_without, first_bad_line, has_lines, rows_of
from lora_lightning.data.sources.silence_warnings import silence_warnings
from lora_lightning.errors import DataError, did_you_mean, nearest

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
TABLE = {"keep_default_na": False}  # pandas would read the words "NA", "null" and "None" as missing
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", TABLE),
    ".tsv": ("csv", {**TABLE, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
"""Builder of `datasets` and its settings by file suffix."""

UNREADABLE = "__unreadable__"
"""Column of a stream that tells why a row cannot be read."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_table(
    source: str,
    split: str,
    *,
    columns: Sequence[str] | None = None,
    field: str | None = None,
    on_error: OnError = "raise",
    skipped: dict[str, int] | None = None,
) -> datasets.Dataset:
    """The examples that `source` names.

    Args:
        source: A file (CSV, TSV, JSON, JSONL, Parquet, or TXT with an example per non-empty line), a folder, or a hub
            id `owner/name`. Folder and hub id may go on with `:config` and `:split` (`owner/name::test`).
            `builtin:NAME` is a table that needs neither file nor network.
        split: Split to take from a folder or the hub, unless `source` names one.
        columns: Names of the columns of a CSV or TSV file that has no header line.
        field: The setting that holds `source`, for messages.
        on_error: Whether a line of a file that cannot be read is an error, or left out.
        skipped: Where the number of rows that were left out is put down, by source.

    Raises:
        DataError: nothing there, not readable (with the first line that is not), or no examples in it.
    """
    what = f'{field or f"data.{split}"} is "{source}"'
    if source.startswith(PREFIX):
        return builtin_table(source, what)
    name, config, part = (*source.split(":"), "", "")[:3]
    path = Path(source).expanduser()
    if path.is_file():
        table, bad = _read_file(what, path, columns, on_error)
        if skipped is not None:
            skipped[source] = bad
    elif (folder := Path(name).expanduser()).is_dir():
        table = _read_folder(what, folder, config or None, part or split)
    elif HUB_ID.fullmatch(name) and not Path(name).parent.is_dir() and Path(name).suffix not in FORMATS:
        table = _load(what, name, config or None, split=part or split)
    else:
        raise DataError(f"{what}; no such file.{_nearest_file(path)}")
    if not len(table):
        raise DataError(f"{what}; it holds no examples.")
    return table


def read_stream(
    source: str,
    split: str,
    *,
    columns: Sequence[str] | None = None,
    field: str | None = None,
    on_error: OnError = "raise",
) -> datasets.IterableDataset:
    """The examples that `source` names, read while they are used; arguments and errors as for `read_table`.

    With `on_error` "skip", a row that cannot be read has its file, line and reason in the column `UNREADABLE` and
    nothing elsewhere, so that whoever reads the stream can leave it out and count it.
    """
    what = f'{field or f"data.{split}"} is "{source}"'
    if source.startswith(PREFIX):
        return builtin_table(source, what).to_iterable_dataset()
    name, config, part = (*source.split(":"), "", "")[:3]
    path, folder = Path(source).expanduser(), Path(name).expanduser()
    if on_error == "skip":
        return _line_stream(what, path, folder, config or None, part or split, columns)
    if path.is_file():
        builder, options = _format(what, path, columns)
        stream = _load(what, builder, data_files=str(path), split="train", streaming=True, **options)
        return stream.filter(_has_text) if builder == "text" else stream
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(str(folder)).to_iterable_dataset()
    if folder.is_dir():
        return _load(what, str(folder), config or None, split=part or split, streaming=True)
    if not HUB_ID.fullmatch(name) or Path(name).suffix in FORMATS:
        raise DataError(f"{what}; no such file.{_nearest_file(path)}")
    return _load(what, name, config or None, split=part or split, streaming=True)


def _line_stream(
    what: str, path: Path, folder: Path, config: str | None, split: str, columns: Sequence[str] | None
) -> datasets.IterableDataset:
    """Rows read line by line, those that cannot be read too."""
    if path.is_file():
        _format(what, path, columns)
        files = [path]
    elif folder.is_dir() and not (folder / "state.json").is_file():
        with silence_warnings():
            found = datasets.load_dataset_builder(str(folder), config).config.data_files or {}
        files = [Path(file) for file in found.get(split, ())]
    else:
        files = []
    if not files or not all(map(has_lines, files)):
        which = next((f'; "{file.name}" is none' for file in files if not has_lines(file)), "")
        raise DataError(
            f"{what}, streamed with data.on_error: skip, which reads CSV, TSV, JSONL and TXT files by line{which}."
            " Set data.on_error to raise."
        )
    names = _first_columns(files, columns)
    if not names:
        raise DataError(f"{what}; it holds no examples.")
    settings = {"files": [str(file) for file in files], "names": names, "columns": columns and tuple(columns)}
    return cast(datasets.IterableDataset, datasets.IterableDataset.from_generator(_marked_rows, gen_kwargs=settings))


def _first_columns(files: Sequence[Path], columns: Sequence[str] | None) -> tuple[str, ...]:
    """Columns of the first row that can be read."""
    for file in files:
        for row in rows_of(file, columns):
            if not isinstance(row, BadLines):
                return tuple(row)
    return ()


def _marked_rows(files: Sequence[str], names: Sequence[str], columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    for file in files:
        for row in rows_of(Path(file), columns):
            if isinstance(row, BadLines):
                yield {**dict.fromkeys(names), UNREADABLE: f"{file}, line {row.first}: {row.reason}"}
            else:
                yield {**{name: row.get(name) for name in names}, UNREADABLE: None}


def stream_columns(stream: datasets.IterableDataset, source: str) -> list[str]:
    """The columns of a stream that `source` names: those it declares, else those of its first row.

    Raises:
        DataError: not even that can be read.
    """
    try:
        with silence_warnings():
            names = stream.column_names or list(next(iter(stream), {}))
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{source} cannot be read: {first_bad_line([source]) or error}.") from error
    return [name for name in names if name != UNREADABLE]


def _has_text(row: Mapping[str, Any]) -> bool:
    return bool(row["text"].strip())


def require_columns(
    dataset: datasets.Dataset | datasets.IterableDataset, source: str, columns: Mapping[str, str]
) -> None:
    """Check that `dataset`, read from `source`, has the columns that settings name.

    Args:
        dataset: The table.
        source: Where it was read.
        columns: Column by the setting that names it, `{"LabelledText.text": "sentence"}`.

    Raises:
        DataError: a column that is missing, with the nearest one.
    """
    there = stream_columns(dataset, source) if isinstance(dataset, datasets.IterableDataset) else dataset.column_names
    for setting, column in columns.items():
        if column not in there:
            headless = Path(source).suffix in {".csv", ".tsv"}
            hint = " A file without a header line needs its column names in data.columns." if headless else ""
            raise DataError(
                f'{setting} is "{column}"; {Path(source).name} has the columns {", ".join(there)}.'
                f"{did_you_mean(column, there) or hint}"
            )


def require_text(dataset: datasets.Dataset, source: str, columns: Iterable[str]) -> None:
    """Check that no text in `columns` of `dataset`, read from `source`, is missing, and that not all of them are blank.

    Raises:
        DataError: the first row without text, counted from 0, or a column of blanks.
    """
    for column in columns:
        texts = dataset[column][:]
        if None in texts:
            raise DataError(f'{Path(source).name}: "{column}" is missing in row {texts.index(None)}, counted from 0.')
        if not any(str(text).strip() for text in texts):
            raise DataError(f'{Path(source).name}: "{column}" is blank in every row.')


def _read_file(what: str, path: Path, columns: Sequence[str] | None, on_error: OnError) -> tuple[datasets.Dataset, int]:
    """The rows of a file, and how many were left out."""
    suffix, bad = path.suffix.lower(), []
    builder, options = _format(what, path, columns)
    try:
        table = _load(what, builder, data_files=str(path), split="train", **options)
    except DataError as error:
        bad = bad_lines(path, columns)
        if not bad or (columns is not None and bad[0].first == 1):
            raise
        if on_error == "raise" or suffix == ".json":
            advice = "" if suffix == ".json" else " data.on_error: skip leaves such lines out."
            raise DataError(
                f"{what}; line {bad[0].first} cannot be read: {bad[0].reason}.{advice}"
            ) from error.__cause__
        log.warning("%s: left %d rows out, the first in line %d: %s", path, len(bad), bad[0].first, bad[0].reason)
        table = _load(what, builder, data_files=str(copy_without(path, bad)), split="train", **options)
    if builder == "text":
        table = table.select([row for row, text in enumerate(table["text"]) if text.strip()])
    return table, len(bad)


def _format(what: str, path: Path, columns: Sequence[str] | None) -> tuple[str, dict[str, Any]]:
    """Builder of `datasets` for a file, and its settings."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise DataError(f'{what}; a file must end in {", ".join(FORMATS)}, not "{suffix}".')
    if path.stat().st_size == 0:
        raise DataError(f"{what}; it holds no examples.")
    builder, options = FORMATS[suffix]
    headless = columns is not None and builder == "csv"
    return builder, {**options, "column_names": list(columns or ()), "index_col": False} if headless else options


def _read_folder(what: str, folder: Path, config: str | None, split: str) -> datasets.Dataset:
    if (folder / "state.json").is_file():  # one table written by `save_to_disk`, which `load_dataset` refuses
        return datasets.load_from_disk(str(folder))
    return _load(what, str(folder), config, split=split)


def _load(what: str, *args: Any, **options: Any) -> Any:
    try:
        with silence_warnings(), warnings.catch_warnings():
            # fewer names than fields: pandas would drop the rest of each line with a mere warning
            warnings.filterwarnings("error", message="Length of header or names does not match")
            return datasets.load_dataset(*args, **options)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{what}; {_explain(error)}") from error


def _explain(error: Exception) -> str:
    cause = str(error.__cause__ or error).strip().splitlines()[0]
    if isinstance(error, ConnectionError):
        return f"the hub cannot be reached and no copy is cached ({cause}). A local file or folder needs no network."
    if "corresponds to no data" in cause or "No columns to parse" in cause:
        return "it holds no examples."
    if "Length of header" in cause:
        return "its lines have more fields than data.columns has names."
    if "Unknown split" in cause:
        return f'it cannot be read: {cause} Another split is named after the source: "...::test".'
    return f"it cannot be read: {cause}"


def _nearest_file(missing: Path) -> str:
    if not missing.parent.is_dir():
        return f" There is no folder {missing.parent} either."
    close = nearest(missing.name, (path.name for path in missing.parent.iterdir()))
    if close:
        return f" Nearest: {', '.join(close)}."
    return ' A data set of the hub is written "owner/name" or "owner/name:config".'
