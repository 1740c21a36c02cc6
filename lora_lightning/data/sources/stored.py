"""Files of text as tables of `datasets`: read once, and kept on the disk by what they hold."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow  # type: ignore[import-untyped]  # it comes with datasets

from lora_lightning.data.sources.lines import BadLines, Numbered, Reading, rows_of
from lora_lightning.data.sources.opened import PACKED, suffix_of
from lora_lightning.data.sources.texts import feature_of, fitted, kind_of

log = logging.getLogger(__name__)

PLACE = "__place__"
"""Column that tells where a row stands: its line in the file, or, in a data module, a number of `Places`."""
BATCH = 1000
"""Rows that are written together."""


def text_table(path: Path, how: Reading) -> tuple[datasets.Dataset, list[BadLines]]:
    """The rows of a file with their lines in the column `PLACE`, and those that cannot be read.

    A column of a CSV, TSV or TXT file is text. One of JSON has its values' type, or, where they have several, is text.

    Raises:
        DataError: see `rows_of`.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lora_lightning" / "tables"
    kept = folder / f"{_key(path, how)}.arrow"
    known = kept.with_suffix(".bad.json")
    if not (kept.is_file() and known.is_file()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, how, kept, known)
        except PermissionError as error:  # nowhere to keep it
            log.warning("%s is read into memory, as it cannot be kept in %s: %s", path, folder, error)
            return _in_memory(path, how)
    bad = [BadLines(**one) for one in json.loads(known.read_text(encoding="utf-8"))]
    return datasets.Dataset.from_file(str(kept)), bad


def features_of(path: Path, how: Reading) -> datasets.Features:
    """The columns of a file, in the order in which they first come, with their types, and `PLACE`."""
    kinds: dict[str, set[str]] = {}
    for row in rows_of(path, how):
        if isinstance(row, Numbered):
            for name, value in row.row.items():
                kinds.setdefault(name, set()).add(kind_of(value))
    return datasets.Features(
        {**{name: feature_of(found) for name, found in kinds.items()}, PLACE: datasets.Value("int64")}
    )


def _batches(
    path: Path, how: Reading, features: datasets.Features, bad: list[BadLines]
) -> Iterator[pyarrow.RecordBatch]:
    rows = rows_of(path, how)
    schema = features.arrow_schema
    while part := list(islice(rows, BATCH)):
        good = [row for row in part if isinstance(row, Numbered)]
        bad += [row for row in part if isinstance(row, BadLines)]
        columns: dict[str, list[Any]] = {
            name: [fitted(row.row.get(name), feature) for row in good] for name, feature in features.items()
        }
        columns[PLACE] = [row.line for row in good]
        yield pyarrow.RecordBatch.from_pydict(columns, schema=schema)


def _write(path: Path, how: Reading, kept: Path, known: Path) -> None:
    features = features_of(path, how)
    bad: list[BadLines] = []
    table, reasons = (file.with_name(f"{file.name}.{os.getpid()}") for file in (kept, known))  # others may write it too
    with pyarrow.OSFile(str(table), "wb") as sink, pyarrow.ipc.new_stream(sink, features.arrow_schema) as writer:
        for batch in _batches(path, how, features, bad):
            writer.write_batch(batch)
    reasons.write_text(json.dumps([dataclasses.asdict(one) for one in bad]), encoding="utf-8")
    reasons.replace(known)
    table.replace(kept)


def _in_memory(path: Path, how: Reading) -> tuple[datasets.Dataset, list[BadLines]]:
    features, bad = features_of(path, how), list[BadLines]()
    batches = list(_batches(path, how, features, bad))
    return datasets.Dataset(pyarrow.Table.from_batches(batches, schema=features.arrow_schema)), bad


def _key(path: Path, how: Reading) -> str:
    packed = PACKED.get(path.suffix.lower())  # plain text that is called .gz holds the bytes of a file that is read
    digest = hashlib.sha256(repr([_code(), how, suffix_of(path), packed]).encode())
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


@cache
def _code() -> str:
    """The sources of this package: a table is made again by other code."""
    digest = hashlib.sha256(datasets.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
