"""Texts with a label each: classification and regression."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import datasets

from lora_lightning.data.labels import Labels, known_labels, read_labelled, scores
from lora_lightning.data.sources.splits import Sources
from lora_lightning.data.text import TextData
from lora_lightning.data.tokens.encoding import encode_texts


class LabelledText(TextData):
    """Texts, or pairs of texts, with a class or a number each.

    Batches: input_ids, attention_mask, token_type_ids where the tokenizer makes them, labels (int64 classes or float32
    numbers; not in predict).

    Args:
        text: Column of the text.
        text_pair: Column of a second text, for pairs.
        label: Column of the label: strings, class numbers from 0, or numbers on a scale.
        labels: Names of the classes in the order of their numbers; null takes those of the data.
        regression: Labels are numbers on a scale.
        common: Settings that all text data share.
    """

    def __init__(
        self,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        labels: list[str] | None = None,
        regression: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.text = text
        self.text_pair = text_pair
        self.label = label
        self.labels = labels
        self.regression = regression
        self.task_kinds = ("regression",) if regression else ("sequence-classification",)

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows with the text columns and, but for predict, the label column."""
        return self._read(self.sources, split)

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Token ids and label of each row."""
        examples = encode_texts(rows, self._texts, self.tokenizer_object, self.max_length)
        if split == "predict":
            return examples
        values, where = rows[self.label][:], f'LabelledText.label: {split} column "{self.label}"'
        numbers = scores(values, where) if self.regression else self._classes.encode(values, where)
        return examples.add_column("labels", numbers)

    @property
    def num_labels(self) -> int:
        """Outputs that a head needs: the number of classes, or 1 for regression."""
        return 1 if self.regression else len(self.label_names)

    @property
    def label_names(self) -> list[str]:
        """Class names by class number; none for regression. Read from the training data unless `labels` is given."""
        return [] if self.regression else self._classes.names

    @cached_property
    def _classes(self) -> Labels:
        # not `inputs`: neither `limit` nor the held-out share may hide a class
        train = None if self.labels is not None else self._read(replace(self.sources, validation_share=0.0), "train")
        return known_labels("LabelledText", "label", self.labels, train, self.label)

    def _read(self, sources: Sources, split: str) -> datasets.Dataset | None:
        return read_labelled(sources, split, {"text": self.text, "text_pair": self.text_pair}, self.label)

    @property
    def _texts(self) -> list[str]:
        return [column for column in (self.text, self.text_pair) if column is not None]
