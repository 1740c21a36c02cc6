"""What all data with labels share: rows read with their labels, and the numbers that these become."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import datasets
from lightning.pytorch.utilities import rank_zero_only

from lora_lightning.data.labels import Labels, find_labels, named_labels, require_label
from lora_lightning.data.sources.splits import Sources
from lora_lightning.data.table import TableData
from lora_lightning.errors import DataError


class LabelledRows(TableData):
    """Rows with labels. A subclass says which columns it needs, and has the setting `labels`.

    Class facts:
        label_setting: the setting that names the column of labels.
        inputs_are_texts: whether every input is one text.
    """

    label_setting: ClassVar[str] = "label"
    inputs_are_texts: ClassVar[bool] = True
    labels: Sequence[str] | None

    @property
    @abstractmethod
    def input_columns(self) -> dict[str, str]:
        """Columns that every row needs, by the setting that names them. Rows are held out by what these hold."""

    def check_input(self, row: Mapping[str, Any], split: str) -> None:
        """Raise `RowError` for a row whose inputs do not fit, beyond missing texts."""

    def check_labels(self, names: Sequence[str]) -> None:
        """Raise `DataError` for labels that do not fit."""

    def labels_in(self, cell: Any) -> Sequence[Any]:
        """The labels in a cell of the column of labels, none of which is empty; raises `RowError`."""
        require_label(cell, self.where)
        return [cell]

    def check_label(self, cell: Any, row: Mapping[str, Any]) -> None:  # noqa: ARG002 - some depend on the rest
        """Raise `RowError` for a cell that holds a label nobody knows."""
        self.classes.encode(self.labels_in(cell), self.where)

    def announce(self, stage: str) -> None:
        """Print the classes with their counts, before anything is learned."""
        rows = self.inputs("train") if stage == "fit" and self.num_classes else None
        if rows is not None and getattr(rank_zero_only, "rank", 0) == 0:
            labels = (label for cell in rows[self.label_column][:] for label in self.labels_in(cell))
            print(f"classes     {self.classes.told(labels)}", flush=True)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where labels are numbers on a scale."""
        return len(self.label_names)

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows with their columns and, but for predict, that of the labels."""
        return self._read(self.sources, split, self.check_label)

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

    @property
    def where(self) -> str:
        """The column of labels, for messages."""
        return f'{type(self).__name__}.{self.label_setting}, column "{self.label_column}"'

    def _labels_of_data(self) -> Labels:
        # not `inputs`: neither `limit` nor what is held out may hide a class
        everything = replace(self.sources, validation_fraction=0.0)
        rows = self._read(everything, "train", lambda cell, _: self.labels_in(cell))
        if rows is None:
            raise DataError(
                f"{type(self).__name__}.labels is null, and so is train, whose labels would be taken; list the names in"
                " labels."
            )
        if names := self.sources.declared.get(self.label_column):
            return named_labels(names)
        found = [label for cell in rows[self.label_column][:] for label in self.labels_in(cell)]
        return find_labels(found, f"{self.where}, train")

    def _read(
        self, sources: Sources, split: str, check_label: Callable[[Any, Mapping[str, Any]], object]
    ) -> datasets.Dataset | None:
        inputs, learned = self.input_columns, split != "predict"
        columns = {**inputs, self.label_setting: self.label_column} if learned else inputs
        named = {f"{sources.owner}.{setting}": column for setting, column in columns.items()}
        given = list(inputs.values())

        def judge(row: Mapping[str, Any]) -> None:
            self.check_input(row, split)
            if learned:
                check_label(row[self.label_column], row)

        rows: datasets.Dataset | None = sources.read(
            split,
            named,
            texts=given if self.inputs_are_texts else [],
            hold_out_by=given,
            judge=judge,
            judged=list(columns.values()),
        )
        return rows
