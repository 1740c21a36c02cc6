"""What all data with labels share: rows read with their labels, and the numbers that these become."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import datasets

from lora_lightning.data.labels import Labels, find_labels, named_labels
from lora_lightning.data.sources.splits import Sources
from lora_lightning.data.table import TableData
from lora_lightning.errors import DataError


class LabelledRows(TableData):
    """Rows with labels. A subclass says which columns it needs, and has the setting `labels`.

    Class facts:
        label_setting: the setting that names the column of labels.
    """

    label_setting: ClassVar[str] = "label"
    labels: Sequence[str] | None

    @property
    @abstractmethod
    def input_columns(self) -> dict[str, str]:
        """Columns that every row needs, by the setting that names them. Rows are held out by what these hold."""

    def check_rows(self, rows: datasets.Dataset, split: str) -> None:
        """Raise `DataError` for rows that do not fit, beyond missing columns and texts."""

    def check_labels(self, names: Sequence[str]) -> None:
        """Raise `DataError` for labels that do not fit."""

    def label_values(self, rows: datasets.Dataset, split: str) -> Sequence[Any]:  # noqa: ARG002 - for messages
        """The label of each row, or a list of them."""
        values: Sequence[Any] = rows[self.label_column][:]
        return values

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows with their columns and, but for predict, that of the labels."""
        return self._read(self.sources, split)

    @property
    def label_column(self) -> str:
        """The column of labels."""
        column: str = getattr(self, self.label_setting)
        return column

    @property
    def num_labels(self) -> int:
        """Outputs that a head needs."""
        return len(self.label_names)

    @property
    def label_names(self) -> list[str]:
        """Names by class number; read from the training data unless `labels` is given."""
        return self.classes.names

    @cached_property
    def classes(self) -> Labels:
        """The labels that the setting lists, else those that the training data declare or hold.

        Raises:
            DataError: nothing is listed, and there are no training data; or see `find_labels` and `check_labels`.
        """
        classes = self._labels_of_data() if self.labels is None else named_labels(self.labels)
        self.check_labels(classes.names)
        return classes

    def where(self, split: str) -> str:
        """The column of labels, for messages."""
        return f'{type(self).__name__}.{self.label_setting}: {split} column "{self.label_column}"'

    def _labels_of_data(self) -> Labels:
        # not `inputs`: neither `limit` nor what is held out may hide a class
        rows = self._read(replace(self.sources, validation_fraction=0.0), "train")
        if rows is None:
            raise DataError(
                f"{type(self).__name__}.labels is null, and so is train, whose labels would be taken; list the names in"
                " labels."
            )
        values, feature = self.label_values(rows, "train"), rows.features[self.label_column]
        if values and isinstance(values[0], list):
            values, feature = [label for labels in values for label in labels], getattr(feature, "feature", None)
        return find_labels(values, feature, self.where("train"))

    def _read(self, sources: Sources, split: str) -> datasets.Dataset | None:
        inputs = self.input_columns
        columns = inputs if split == "predict" else {**inputs, self.label_setting: self.label_column}
        named = {f"{sources.owner}.{setting}": column for setting, column in columns.items()}
        texts = list(inputs.values())
        rows: datasets.Dataset | None = sources.read(split, named, texts=texts, hold_out_by=texts)
        if rows is not None:
            self.check_rows(rows, split)
        return rows
