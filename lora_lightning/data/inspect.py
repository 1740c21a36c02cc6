"""What a model will really see: decoded examples with their loss mask, numbers of examples, lengths, truncation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import LightningDataModule

import lora_lightning.data
from lora_lightning.data.causal_text import CausalText
from lora_lightning.data.images import LabelledImages
from lora_lightning.data.table import TableData
from lora_lightning.errors import DataError

LEGEND = "[[ ]] marks tokens without loss: the model reads them and does not learn to write them."


def show_examples(datamodule: LightningDataModule, n: int = 3) -> str:
    """The first `n` training examples as the model gets them, and figures of every split; call after `setup("fit")`.

    Plain text, to be printed as it is: the brackets around tokens without loss are no markup.

    Raises:
        DataError: the data module is not one of this package.
    """
    if not isinstance(datamodule, TableData):
        known = ", ".join(name for name in lora_lightning.data.__all__ if name != "ResumableLoader")
        raise DataError(f"data is {type(datamodule).__name__}; only these can be inspected: {known}.")
    return "\n".join([*_figures(datamodule), *_examples(datamodule, n)])


def _figures(datamodule: TableData) -> Iterator[str]:
    if isinstance(datamodule, LabelledImages):
        yield f"{'split':<12}{'examples':>9}  classes"
        yield from (datamodule.figures(split) for split in datamodule.ready)
    else:
        yield from _text_figures(datamodule)


def _text_figures(datamodule: TableData) -> Iterator[str]:
    yield f"{'split':<12}{'examples':>9}{'truncated':>11}{'tokens: min':>13}{'median':>8}{'max':>6}"
    for split in datamodule.ready:
        examples = datamodule.examples(split)
        lengths = list(_lengths(examples["input_ids"]))
        truncated = sum(examples["truncated"]) / len(examples)
        middle = round(statistics.median(lengths))
        yield f"{split:<12}{len(examples):>9}{truncated:>11.1%}{min(lengths):>13}{middle:>8}{max(lengths):>6}"
    if isinstance(datamodule, CausalText) and datamodule.packing:
        packs, tokens = datamodule.packs("train"), sum(len(ids) for ids in datamodule.examples("train")["input_ids"])
        full = tokens / (packs * datamodule.max_length)
        yield f"packing: train has {packs} rows of {datamodule.max_length} tokens, {full:.1%} full"
    for split, count in getattr(datamodule, "dropped", {}).items():
        if count:
            yield f"dropped from {split}: {count} examples without a token to learn"


def _lengths(rows: Iterable[Any]) -> Iterator[int]:
    """Tokens of each text; of each of several in a row."""
    for ids in rows:
        yield from _lengths(ids) if isinstance(ids[0], list) else [len(ids)]


def _examples(datamodule: TableData, n: int) -> Iterator[str]:
    examples = datamodule.examples("train")
    texts = [datamodule.describe(examples[number]) for number in range(min(n, len(examples)))]
    if any("[[" in text for text in texts):
        yield f"\n{LEGEND}"
    for number, text in enumerate(texts):
        yield f"\n--- train example {number}: {text}"
