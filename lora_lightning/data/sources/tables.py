"""Read one table of examples from a file, a folder or the hub, and check its columns and texts."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets

from lora_lightning.data.sources.builtin import PREFIX, builtin_table
from lora_lightning.data.sources.faults import Faults, Places
from lora_lightning.data.sources.lines import (
    PLAIN,
    BadLines,
    Numbered,
    Reading,
    has_lines,
    is_document,
    lone_separator,
    rows_of,
)
from lora_lightning.data.sources.opened import PACKED, suffix_of
from lora_lightning.data.sources.silence_warnings import silence_warnings
from lora_lightning.data.sources.stored import PLACE, text_table
from lora_lightning.data.sources.texts import as_text
from lora_lightning.errors import DataError, did_you_mean, nearest

log = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt")
"""Formats of files."""
UNREADABLE = "__unreadable__"
"""Column of a stream that tells why a row cannot be read."""
AHEAD = 1000
"""Rows of each streamed file that are looked through for columns."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def on_hub(source: str) -> bool:
    """Whether a source of data is not here, but named as one on the hub."""
    path = Path(name := source.partition(":")[0])
    here = path.exists() or path.parent.is_dir() or suffix_of(path) in SUFFIXES
    return bool(HUB_ID.fullmatch(name)) and not here


def source_names(given: Any) -> list[str]:
    """Names of a split's sources, of which there may be one, several, or several with weights."""
    return [given] if isinstance(given, str) else list(given or ())


def read_table(
    source: str,
    split: str,
    how: Reading = PLAIN,
    *,
    field: str | None = None,
    faults: Faults | None = None,
) -> datasets.Dataset:
    """The examples that `source` names, with the column `PLACE`.

    Args:
        source: A file (CSV, TSV, JSON, JSONL, Parquet, or TXT with an example per non-empty line; text formats also
            packed as .gz, .bz2, .xz or .zst), a folder, or a hub id `owner/name`. Folder and hub id may go on with
            `:config` and `:split` (`owner/name::test`). `builtin:NAME` is a table that needs neither file nor network.
        split: Split to take from a folder or the hub, unless `source` names one.
        how: Columns, encoding and separator of text files.
        field: The setting that holds `source`, for messages.
        faults: What becomes of rows that cannot be read; errors if None.

    Raises:
        DataError: nothing there, not readable (with the first line that is not), or no examples in it.
    """
    faults = faults or Faults()
    field = field or f"data.{split}"
    what = f'{field} is "{source}"'
    if source.startswith(PREFIX):
        return _counted(builtin_table(source, what), source, faults.places)
    name, config, part = (*source.split(":"), "", "")[:3]
    path = Path(source).expanduser()
    if path.is_file():
        table = _read_files(what, field, [path], how, faults)
    elif (folder := Path(name).expanduser()).is_dir():
        files = _files_of(what, folder, config or None, part or split)
        if files and all(map(has_lines, files)):
            table = _read_files(what, field, files, how, faults)
        else:
            table = _counted(_read_folder(what, folder, config or None, part or split), name, faults.places)
    elif HUB_ID.fullmatch(name) and not Path(name).parent.is_dir() and suffix_of(Path(name)) not in SUFFIXES:
        table = _counted(_load(what, name, config or None, split=part or split), name, faults.places)
    else:
        raise DataError(f"{what}; no such file.{_nearest_file(path)}")
    if not len(table):
        raise DataError(f"{what}; it holds no examples.{_left_out(field, faults)}")
    return table


def read_stream(
    source: str,
    split: str,
    how: Reading = PLAIN,
    *,
    field: str | None = None,
    faults: Faults | None = None,
) -> datasets.IterableDataset:
    """The examples that `source` names, read while they are used; arguments and errors as for `read_table`.

    Files of text are read as for a table, and all their values are texts. A row that cannot be read has its reason in
    the column `UNREADABLE` and nothing elsewhere; whoever reads the stream leaves it out, or makes it an error.
    """
    faults = faults or Faults()
    what = f'{field or f"data.{split}"} is "{source}"'
    if source.startswith(PREFIX):
        return builtin_table(source, what).to_iterable_dataset()
    name, config, part = (*source.split(":"), "", "")[:3]
    path, folder = Path(source).expanduser(), Path(name).expanduser()
    files = [path] if path.is_file() else []
    if not files and folder.is_dir() and not (folder / "state.json").is_file():
        files = _files_of(what, folder, config or None, part or split)
    for file in files if path.is_file() else ():
        check_format(what, file)
    if files and all(map(has_lines, files)):
        return _line_stream(what, files, how, faults)
    if faults.on_error == "skip":
        which = next((f'; "{file.name}" is none' for file in files if not has_lines(file)), "")
        raise DataError(
            f"{what}, streamed with data.on_error: skip, which reads CSV, TSV, JSONL and TXT files by line{which}."
            " Set data.on_error to raise."
        )
    if path.is_file():
        return _load(what, "parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(str(folder)).to_iterable_dataset()
    if folder.is_dir():
        return _load(what, str(folder), config or None, split=part or split, streaming=True)
    if not HUB_ID.fullmatch(name) or suffix_of(Path(name)) in SUFFIXES:
        raise DataError(f"{what}; no such file.{_nearest_file(path)}")
    return _load(what, name, config or None, split=part or split, streaming=True)


def _line_stream(what: str, files: Sequence[Path], how: Reading, faults: Faults) -> datasets.IterableDataset:
    """Rows read line by line, those that cannot be read too."""
    names: dict[str, None] = {}
    for file in files:
        for row, _ in zip(rows_of(file, how), range(AHEAD), strict=False):
            if isinstance(row, Numbered):
                names |= dict.fromkeys(row.row)
            elif faults.on_error == "raise":
                raise DataError(f"{what}; {_unreadable(what, file, how, row)}")
    if not names:
        bad = next((row for file in files for row in rows_of(file, how)), None)
        why = f" Its first line cannot be read: {bad.reason}." if isinstance(bad, BadLines) else ""
        raise DataError(f"{what}; it holds no examples.{why}")
    starts = [faults.places.start(str(file), _unit(file, how)) for file in files]
    settings = {"files": list(zip(map(str, files), starts, strict=True)), "names": tuple(names), "how": how}
    features = datasets.Features(
        {
            **{name: datasets.Value("string") for name in (*names, UNREADABLE)},
            PLACE: datasets.Value("int64"),
        }
    )
    made = datasets.IterableDataset.from_generator(_marked_rows, gen_kwargs=settings, features=features)
    return cast(datasets.IterableDataset, made)


def _marked_rows(files: Sequence[tuple[str, int]], names: Sequence[str], how: Reading) -> Iterator[dict[str, Any]]:
    for file, start in files:
        for row in rows_of(Path(file), how):
            if isinstance(row, BadLines):
                yield {**dict.fromkeys(names), UNREADABLE: row.reason, PLACE: start + row.first}
                continue
            others = [name for name in row.row if name not in names]
            late = f'it has the column "{others[0]}", which no row of the first {AHEAD} has' if others else None
            yield {**{name: as_text(row.row.get(name)) for name in names}, UNREADABLE: late, PLACE: start + row.line}


def stream_columns(stream: datasets.IterableDataset, source: str) -> list[str]:
    """The columns of a stream that `source` names: those it declares, else those of its first row.

    Raises:
        DataError: not even that can be read.
    """
    try:
        with silence_warnings():
            names = stream.column_names or list(next(iter(stream), {}))
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{source} cannot be read: {error}.") from error
    return [name for name in names if name not in (UNREADABLE, PLACE)]


def require_columns(
    dataset: datasets.Dataset | datasets.IterableDataset, source: str, columns: Mapping[str, str]
) -> None:
    """Check that `dataset`, read from `source`, has the columns that settings name.

    Args:
        dataset: The table.
        source: Where it was read.
        columns: Column by the setting that names it, `{"LabelledText.text": "sentence"}`.

    Raises:
        DataError: a column that is missing, with the nearest one, or the setting that helps.
    """
    if isinstance(dataset, datasets.IterableDataset):
        there = stream_columns(dataset, source)
    else:
        there = [name for name in dataset.column_names if name != PLACE]
    for setting, column in columns.items():
        if column not in there:
            table = suffix_of(Path(source)) in {".csv", ".tsv"}
            other = lone_separator(there) if table else ""
            hint = " A file without a header line needs its column names in data.columns." if table else ""
            if other:
                mark = {"\t": "\\t"}.get(other, other)
                hint = f' The header looks as if "{mark}" separated the columns: set data.separator to "{mark}".'
            raise DataError(
                f'{setting} is "{column}"; {Path(source).name} has the columns {", ".join(there)}.'
                f"{hint if other else did_you_mean(column, there) or hint}"
            )


def _read_files(what: str, field: str, files: Sequence[Path], how: Reading, faults: Faults) -> datasets.Dataset:
    """The rows of files of text, or of one Parquet file."""
    if not has_lines(files[0]):
        check_format(what, files[0])
        return _counted(
            _load(what, "parquet", data_files=glob.escape(str(files[0])), split="train"), str(files[0]), faults.places
        )
    return joined(
        [_read_lines(what, field, file, how, faults) for file in files], lambda reason: DataError(what + reason)
    )


def _read_lines(what: str, field: str, file: Path, how: Reading, faults: Faults) -> datasets.Dataset:
    check_format(what, file)
    try:
        table, bad = text_table(file, how)
    except DataError as error:
        raise DataError(f"{what}; {error}") from error.__cause__
    if bad and (faults.on_error == "raise" or (is_whole(file, how) and not len(table))):
        raise DataError(f"{what}; {_unreadable(what, file, how, bad[0])}")
    start = faults.places.start(str(file), _unit(file, how))
    for one in bad:
        faults.add(field.rpartition(".")[2], start + one.first, one.kind, one.reason)
    lines = table.with_format("numpy")[PLACE][:]
    return table.remove_columns(PLACE).add_column(PLACE, [start + int(line) for line in lines])


def _unreadable(what: str, file: Path, how: Reading, bad: BadLines) -> str:
    """What is wrong with a file's first row that cannot be read."""
    advice = "" if is_whole(file, how) else " data.on_error: skip leaves such rows out."
    name = "" if what.endswith(f'{file.name}"') else f"{file.name}, "
    return f"{name}line {bad.first} cannot be read: {bad.reason}.{advice}"


def is_whole(file: Path, how: Reading) -> bool:
    """Whether a file is one JSON document, of which nothing behind a fault can be read."""
    return suffix_of(file) == ".json" and is_document(file, how)


def _unit(file: Path, how: Reading) -> str:
    """What rows of a file are counted in; those of a document on one line by their numbers."""
    if not is_whole(file, how):
        return "line"
    first = [row for row, _ in zip(rows_of(file, how), range(1), strict=False)]
    return "row" if first and isinstance(first[0], Numbered) and first[0].line == 0 else "line"


def _counted(table: datasets.Dataset, name: str, places: Places) -> datasets.Dataset:
    """`table` with places by row."""
    start = places.start(name, "row")
    if PLACE in getattr(table, "column_names", (PLACE,)):
        return table
    return table.add_column(PLACE, list(range(start, start + len(table))))


def joined(tables: Sequence[datasets.Dataset], failed: Callable[[str], Exception]) -> datasets.Dataset:
    """Tables one after another; `failed` makes an error of the reason why they do not fit together."""
    if len(tables) == 1:
        return tables[0]
    try:
        return datasets.concatenate_datasets(list(tables))
    except ValueError as error:
        raise failed(str(error).strip().splitlines()[0]) from error


def check_format(what: str, path: Path) -> None:
    """Raise `DataError` for a file of another format, and an empty one."""
    suffix, packed = suffix_of(path), path.suffix.lower() in PACKED
    if suffix not in SUFFIXES or (packed and not has_lines(path)):
        known = f"{', '.join(SUFFIXES)}; text formats also with {', '.join(PACKED)} behind"
        raise DataError(
            f'{what}; a file must end in {known}, not "{"".join(path.suffixes[-2:]) if packed else suffix}".'
        )
    if path.stat().st_size == 0:
        raise DataError(f"{what}; it holds no examples.")


def _left_out(field: str, faults: Faults) -> str:
    told = faults.told(field.rpartition(".")[2])
    return f" Left out: {told}." if told else ""


def _files_of(what: str, folder: Path, config: str | None, split: str) -> list[Path]:
    """The files of a split of a folder, as `datasets` finds them; none of one written by `save_to_disk`."""
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return []
    if any(mark in str(folder.resolve()) for mark in "*?["):
        raise DataError(
            f"{what}; a folder is searched by patterns, so that its path must hold none of * ? [. Name its files."
        )
    try:
        with silence_warnings():
            found = datasets.load_dataset_builder(str(folder), config).config.data_files or {}
    except (datasets.exceptions.DatasetsError, ValueError, OSError):
        return []  # `load_dataset` tells why
    return [Path(file) for file in found.get(split, ())]


def _read_folder(what: str, folder: Path, config: str | None, split: str) -> datasets.Dataset:
    if (folder / "state.json").is_file():  # one table written by `save_to_disk`, which `load_dataset` refuses
        return datasets.load_from_disk(str(folder))
    return _load(what, str(folder), config, split=split)


def _load(what: str, *args: Any, **options: Any) -> Any:
    try:
        with silence_warnings():
            return datasets.load_dataset(*args, **options)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise DataError(f"{what}; {_explain(error)}") from error


def _explain(error: Exception) -> str:
    cause = str(error.__cause__ or error).strip().splitlines()[0]
    if isinstance(error, ConnectionError):
        return f"the hub cannot be reached and no copy is cached ({cause}). A local file or folder needs no network."
    if "corresponds to no data" in cause:
        return "it holds no examples."
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
