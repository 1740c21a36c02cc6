"""What a model will really see: decoded examples with their loss mask, numbers of examples, lengths, truncation."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from lightning.pytorch import LightningDataModule

from lora_lightning.data.causal import NO_LOSS
from lora_lightning.data.causal_text import CausalText
from lora_lightning.data.text import TextData
from lora_lightning.errors import DataError

LEGEND = "[[ ]] marks tokens without loss: the model reads them and does not learn to write them."


def show_examples(datamodule: LightningDataModule, n: int = 3) -> str:
    """The first `n` training examples as the model gets them, and figures of every split; call after `setup("fit")`.

    Plain text, to be printed as it is: the brackets around tokens without loss are no markup.

    Raises:
        DataError: the data module is not one of this package.
    """
    if not isinstance(datamodule, TextData):
        name = type(datamodule).__name__
        raise DataError(
            f"data is {name}; only LabelledText, TaggedWords, Completions, PlainText and PyDocs can be inspected."
        )
    return "\n".join([*_figures(datamodule), *_examples(datamodule, n)])


def mark(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> str:
    """Decoded tokens, those without loss in double brackets."""
    runs = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] == NO_LOSS)
    texts = ((masked, tokenizer.decode([token for token, _ in run])) for masked, run in runs)
    return "".join(f"[[{text}]]" if masked else text for masked, text in texts)


def _figures(datamodule: TextData) -> Iterator[str]:
    yield f"{'split':<12}{'examples':>9}{'truncated':>11}{'tokens: min':>13}{'median':>8}{'max':>6}"
    for split in datamodule.ready:
        examples = datamodule.examples(split)
        lengths = [len(ids) for ids in examples["input_ids"]]
        share = sum(examples["truncated"]) / len(lengths)
        middle = round(statistics.median(lengths))
        yield f"{split:<12}{len(lengths):>9}{share:>11.1%}{min(lengths):>13}{middle:>8}{max(lengths):>6}"
    if isinstance(datamodule, CausalText) and datamodule.packing:
        packs, tokens = datamodule.packs("train"), sum(len(ids) for ids in datamodule.examples("train")["input_ids"])
        full = tokens / (packs * datamodule.max_length)
        yield f"packing: train has {packs} rows of {datamodule.max_length} tokens, {full:.1%} full"
    for split, count in getattr(datamodule, "dropped", {}).items():
        if count:
            yield f"dropped from {split}: {count} examples without a token to learn"


def _examples(datamodule: TextData, n: int) -> Iterator[str]:
    examples = datamodule.examples("train")
    if isinstance(examples[0]["labels"], list):
        yield f"\n{LEGEND}"
    for number in range(min(n, len(examples))):
        yield f"\n--- train example {number}: {_describe(datamodule, examples[number])}"


def _describe(datamodule: TextData, example: Mapping[str, Any]) -> str:
    ids, labels, tokenizer = example["input_ids"], example["labels"], datamodule.tokenizer_object
    if isinstance(labels, list):
        return f"{len(ids)} tokens\n{mark(ids, labels, tokenizer)}"
    names = getattr(datamodule, "label_names", [])
    return f"label {names[labels] if names else labels}\n{tokenizer.decode(ids)}"
