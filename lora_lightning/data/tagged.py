"""Words with a tag each, for named entities, parts of speech and the like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import datasets

from lora_lightning.data.batches.loader import count_labelled
from lora_lightning.data.labelled_rows import LabelledRows
from lora_lightning.data.labels import require_label
from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.text import TextData
from lora_lightning.data.tokens.causal import NO_LOSS
from lora_lightning.data.tokens.encoding import tokenised
from lora_lightning.errors import DataError


class TaggedWords(LabelledRows, TextData):
    """Texts as lists of words, with a tag for each word.

    A word's first token carries its tag; its other tokens, and special ones, have no loss. Words beyond max_length are
    cut off. Needs a fast tokenizer, which tells what token belongs to which word.

    Batches: input_ids, attention_mask, token_type_ids, labels (-100 where there is no loss), window_tokens.

    Args:
        words: Column of word lists; JSON, JSONL, Parquet and hub data have such columns.
        tags: Column of tag lists, as long as the words: names, or numbers from 0. Not needed for predict.
        labels: Tag names by number; null takes those that the data declare or hold.
        common: Settings that all text data share.
    """

    task_kinds = ("token-classification",)
    label_setting = "tags"
    inputs_are_texts = False

    def __init__(
        self, words: str = "tokens", tags: str = "tags", labels: Sequence[str] | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        self.words = words
        self.tags = tags
        self.labels = labels
        self.count = count_labelled

    @property
    def input_columns(self) -> dict[str, str]:
        """The words."""
        return {"words": self.words}

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Token ids of each row, and a tag on the first token of each word."""
        tokenizer = self.tokenizer_object
        if not tokenizer.is_fast:
            raise DataError(f"TaggedWords.tokenizer is {type(tokenizer).__name__}; it needs a fast tokenizer.")
        tagged = split != "predict"
        labels = self.classes if tagged else None

        def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
            encoded = tokenizer(
                batch[self.words], is_split_into_words=True, truncation=True, max_length=self.max_length
            )
            kept = []
            for row in range(len(numbers)):
                words = batch[self.words][row]
                ids = labels.encode(batch[self.tags][row], self.where) if labels else [0] * len(words)
                kept.append(_on_first_tokens(encoded.word_ids(row), ids))
            cut = [bool(encoding.overflowing) for encoding in encoded.encodings]
            return {**encoded, "labels": kept, "index": numbers, "truncated": cut}

        return tokenised(rows, encode)

    def describe(self, example: Mapping[str, Any]) -> str:
        """Each word as its first token, with its tag behind it."""
        tokens = self.tokenizer_object.convert_ids_to_tokens(example["input_ids"])
        tagged = zip(tokens, example["labels"], strict=True)
        shown = (f"{token}/{self.label_names[tag]}" if tag != NO_LOSS else token for token, tag in tagged)
        return f"{len(tokens)} tokens\n{' '.join(shown)}"

    def readable(self, row: dict[str, Any]) -> dict[str, Any]:
        """Tags by name, and a column `tagged` with the predicted tag behind each word."""
        tags, words, predicted = row.get(self.tags), row[self.words], row["prediction"].split(" ")
        tagged = " ".join(f"{word}/{tag}" for word, tag in zip_longest(words, predicted[: len(words)], fillvalue="-"))
        if isinstance(tags, list) and all(isinstance(tag, int) for tag in tags):
            row = {**row, self.tags: [self.label_names[tag] for tag in tags]}
        return {**row, "tagged": tagged}

    def labels_in(self, cell: Any) -> Sequence[Any]:
        """The tags of a row."""
        for tag in cell:
            require_label(tag, self.where)
        tags: Sequence[Any] = cell
        return tags

    def check_input(self, row: Mapping[str, Any], split: str) -> None:
        """Raise `RowError` for a row whose words are no list of texts, or whose tags are not as many."""
        words, kind = row[self.words], "with words or tags that do not fit"
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise RowError(
                kind, f'TaggedWords: column "{self.words}" must hold a list of words; it holds {words!r:.60}'
            )
        own = row[self.tags] if split != "predict" else words
        if not isinstance(own, list) or len(own) != len(words):
            found = f"{len(own)} tags" if isinstance(own, list) else "no list"
            raise RowError(kind, f'TaggedWords: {len(words)} words, but column "{self.tags}" holds {found}')


def _on_first_tokens(word_ids: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """A word's tag on its first token, -100 elsewhere."""
    labels, before = [], None
    for word in word_ids:
        labels.append(NO_LOSS if word is None or word == before else tags[word])
        before = word
    return labels
