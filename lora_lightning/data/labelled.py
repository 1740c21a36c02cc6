"""Texts with a label each: classification and regression."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import datasets

from lora_lightning.data.labelled_rows import LabelledRows
from lora_lightning.data.labels import score
from lora_lightning.data.text import TextData
from lora_lightning.data.tokens.encoding import encode_texts


class TextsWithLabels(LabelledRows, TextData):
    """Texts, or pairs of texts, with labels of any kind.

    Args:
        text: Column of the text.
        text_pair: Column of a second text, for pairs.
        label: Column of the labels.
        labels: Names of the labels in the order of their numbers; null takes those of the data.
        common: Settings that all text data share.
    """

    def __init__(
        self,
        *,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        labels: list[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.text = text
        self.text_pair = text_pair
        self.label = label
        self.labels = labels

    @property
    def input_columns(self) -> dict[str, str]:
        """The text, and the second one of a pair."""
        return {"text": self.text} if self.text_pair is None else {"text": self.text, "text_pair": self.text_pair}

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Token ids and, but for predict, labels of each row."""
        columns = list(self.input_columns.values())
        examples = encode_texts(rows, columns, self.tokenizer_object, self.max_length)
        return examples if split == "predict" else examples.add_column("labels", self.targets(rows))

    @abstractmethod
    def targets(self, rows: datasets.Dataset) -> list[Any]:
        """What is to be learned of each row."""


class LabelledText(TextsWithLabels):
    """Texts, or pairs of texts, with a class or a number each.

    Batches: input_ids, attention_mask, token_type_ids where the tokenizer makes them, labels (int64 classes or float32
    numbers; not in predict).

    Args:
        label: Column of the label: texts, class numbers from 0, or numbers on a scale. They are matched as
            texts; an empty one is an error.
        regression: Labels are numbers on a scale.
        common: Settings that all texts with labels share.
    """

    def __init__(self, *, label: str = "label", regression: bool = False, **common: Any) -> None:
        super().__init__(label=label, **common)
        self.regression = regression
        self.task_kinds = ("regression",) if regression else ("sequence-classification",)

    def targets(self, rows: datasets.Dataset) -> list[Any]:
        """Class numbers, or numbers on a scale."""
        cells = rows[self.label][:]
        return (
            [score(cell, self.where) for cell in cells] if self.regression else self.classes.encode(cells, self.where)
        )

    def check_label(self, cell: Any, row: Mapping[str, Any]) -> None:
        """Raise `RowError` for a label that nobody knows, or that is no number."""
        if self.regression:
            score(cell, self.where)
        else:
            super().check_label(cell, row)

    @property
    def num_labels(self) -> int:
        """Outputs that a head needs: the number of classes, or 1 for regression."""
        return 1 if self.regression else len(self.label_names)

    @property
    def label_names(self) -> list[str]:
        """Class names by class number; none for regression. Read from the training data unless `labels` is given."""
        return [] if self.regression else self.classes.names
