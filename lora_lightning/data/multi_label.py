"""Texts with any number of labels each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from lora_lightning.data.labelled import TextsWithLabels
from lora_lightning.data.labels import require_label
from lora_lightning.data.sources.faults import RowError
from lora_lightning.errors import DataError, check


class MultiLabelText(TextsWithLabels):
    """Texts, or pairs of texts, with any number of labels each, none included.

    Batches: input_ids, attention_mask, token_type_ids where the tokenizer makes them, labels (float32, one column a
    label; not in predict).

    Args:
        label: Column of the labels: lists of names or of numbers from 0, or names with `delimiter` between.
        delimiter: What stands between the labels of a text; blanks around it do not count.
        common: Settings that all texts with labels share.
    """

    task_kinds = ("multi-label-classification",)

    def __init__(self, *, label: str = "labels", delimiter: str = ",", **common: Any) -> None:
        super().__init__(label=label, **common)
        self.delimiter = delimiter
        check(bool(delimiter.strip()), self, "delimiter", "it must hold a mark that no label holds.")

    def targets(self, rows: datasets.Dataset) -> list[Any]:
        """1.0 for each of a row's labels, 0.0 for the others."""
        many_hot = []
        for cell in rows[self.label][:]:
            own = set(self.classes.encode(self.labels_in(cell), self.where))
            many_hot.append([float(label in own) for label in range(self.num_labels)])
        return many_hot

    def labels_in(self, cell: Any) -> Sequence[Any]:
        """The labels of a row as a list; raises `RowError`."""
        if isinstance(cell, str):
            names = map(str.strip, cell.split(self.delimiter))
            return [name for name in names if name]
        if not isinstance(cell, list):
            raise RowError(
                "without a label",
                f'{self.where}: {cell!r} is neither a list nor names with "{self.delimiter}" between',
            )
        for label in cell:
            require_label(label, self.where)
        return cell

    def describe(self, example: Mapping[str, Any]) -> str:
        """The text with its labels."""
        names = [name for name, there in zip(self.label_names, example["labels"], strict=True) if there]
        return f"labels {', '.join(names) or '(none)'}\n{self.tokenizer_object.decode(example['input_ids'])}"

    def readable(self, row: dict[str, Any]) -> dict[str, Any]:
        """Labels as names with commas between, as predictions are."""
        value = row.get(self.label)
        if not isinstance(value, list):
            return row
        names = []
        for label in value:
            number = self.classes.find(label)
            names.append(str(label) if number is None else self.label_names[number])
        return {**row, self.label: ", ".join(names)}

    def check_labels(self, names: Sequence[str]) -> None:
        """Raise `DataError` for fewer than two labels."""
        if len(names) < 2:
            raise DataError(
                f"MultiLabelText.labels are {names}; at least 2 are needed. For one yes-or-no question use "
                "LabelledText."
            )
