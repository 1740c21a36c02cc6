"""Rows to token ids."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import datasets
from tqdm import tqdm

from lora_lightning.data.sources.silence_warnings import silence_warnings

SILENT = 3.0
"""Seconds of work without a bar."""


def tokenised(rows: datasets.Dataset, encode: Callable[[dict[str, list[Any]], list[int]], Any]) -> datasets.Dataset:
    """The rows that `encode(columns, row numbers)` makes of batches of rows; a bar is shown if it takes long.

    Kept in memory: `datasets` takes a function of an installed module for the same as long as its name is, so that its
    cache would outlive the code. `token_cache` knows better.
    """

    def told(batch: dict[str, list[Any]], numbers: list[int]) -> Any:
        made = encode(batch, numbers)
        bar.update(len(numbers))
        return made

    with silence_warnings(), tqdm(total=len(rows), delay=SILENT, desc="tokenising", unit=" rows", leave=False) as bar:
        return rows.map(
            told,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=uuid.uuid4().hex,  # otherwise `encode` is pickled for one, and with it all it refers to
        )


def encode_texts(rows: datasets.Dataset, columns: Sequence[str], tokenizer: Any, max_length: int) -> datasets.Dataset:
    """Token ids of one text, or a pair, a row, cut to `max_length`; with `index` and `truncated`."""

    def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
        texts = [[str(text) for text in batch[column]] for column in columns]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        cut = [bool(encoding.overflowing) for encoding in encoded.encodings or ()]  # only fast tokenizers tell
        full = [len(ids) == max_length for ids in encoded["input_ids"]]
        return {**encoded, "index": numbers, "truncated": cut or full}

    return tokenised(rows, encode)
