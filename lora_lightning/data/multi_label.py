"""Texts with any number of labels each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import datasets

from lora_lightning.data.labels import Labels, known_labels, read_labelled
from lora_lightning.data.sources.splits import Sources
from lora_lightning.data.text import TextData
from lora_lightning.data.tokens.encoding import encode_texts
from lora_lightning.errors import DataError, check


class MultiLabelText(TextData):
    """Texts, or pairs of texts, with any number of labels each, none included.

    Batches: input_ids, attention_mask, token_type_ids where the tokenizer makes them, labels (float32, one column a
    label; not in predict).

    Args:
        text: Column of the text.
        text_pair: Column of a second text, for pairs.
        label: Column of the labels: lists of names or of numbers from 0, or names with `delimiter` between.
        delimiter: What stands between the labels of a text; blanks around it do not count.
        labels: Names of the labels in the order of their numbers; null takes those of the data.
        common: Settings that all text data share.
    """

    task_kinds = ("multi-label-classification",)

    def __init__(
        self,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "labels",
        delimiter: str = ",",
        labels: list[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.text = text
        self.text_pair = text_pair
        self.label = label
        self.delimiter = delimiter
        self.labels = labels
        check(bool(delimiter.strip()), self, "delimiter", "it must hold a mark that no label holds.")

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows with the text columns and, but for predict, the column of labels."""
        return self._read(self.sources, split)

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Token ids of each row, and 1.0 for each of its labels."""
        examples = encode_texts(rows, self._texts, self.tokenizer_object, self.max_length)
        if split == "predict":
            return examples
        count, hot = self.num_labels, []
        for number, names in enumerate(self._lists(rows, split)):
            where = f'MultiLabelText.label: {split} column "{self.label}", row {number}'
            own = set(self._classes.encode(names, where))
            hot.append([float(label in own) for label in range(count)])
        return examples.add_column("labels", hot)

    def describe(self, example: Mapping[str, Any]) -> str:
        """The text with its labels."""
        names = [name for name, there in zip(self.label_names, example["labels"], strict=True) if there]
        return f"labels {', '.join(names) or '(none)'}\n{self.tokenizer_object.decode(example['input_ids'])}"

    def readable(self, row: dict[str, Any]) -> dict[str, Any]:
        """Labels as names with commas between, as predictions are."""
        value = row.get(self.label)
        if not isinstance(value, list):
            return row
        numbers = [self._classes.ids.get(label, label) for label in value]
        names = [self.label_names[n] if isinstance(n, int) and n < self.num_labels else str(n) for n in numbers]
        return {**row, self.label: ", ".join(names)}

    @property
    def num_labels(self) -> int:
        """Outputs that a head needs."""
        return len(self.label_names)

    @property
    def label_names(self) -> list[str]:
        """Names by number; read from the training data unless `labels` is given."""
        return self._classes.names

    @cached_property
    def _classes(self) -> Labels:
        train = None if self.labels is not None else self._read(replace(self.sources, validation_share=0.0), "train")
        classes = known_labels(
            "MultiLabelText", "label", self.labels, train, self.label, lambda rows: self._lists(rows, "train")
        )
        if len(classes.names) < 2:
            raise DataError(
                f"MultiLabelText.labels are {classes.names}; at least 2 are needed. For one yes-or-no question use "
                "LabelledText."
            )
        return classes

    def _lists(self, rows: datasets.Dataset, split: str) -> list[Sequence[Any]]:
        """The labels of each row as a list."""
        found: list[Sequence[Any]] = []
        for number, value in enumerate(rows[self.label]):
            if isinstance(value, str):
                found.append([part.strip() for part in value.split(self.delimiter) if part.strip()])
            elif isinstance(value, list):
                found.append(value)
            else:
                raise DataError(
                    f'MultiLabelText.label: {split} column "{self.label}", row {number} (counted from 0): {value!r} is '
                    f'neither a list nor names with "{self.delimiter}" between.'
                )
        return found

    def _read(self, sources: Sources, split: str) -> datasets.Dataset | None:
        return read_labelled(sources, split, {"text": self.text, "text_pair": self.text_pair}, self.label)

    @property
    def _texts(self) -> list[str]:
        return [column for column in (self.text, self.text_pair) if column is not None]
