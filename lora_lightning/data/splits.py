"""Which source a split comes from, and how a validation share is held out of the training data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets

from lora_lightning.data.sources import read_table, require_columns, require_text
from lora_lightning.errors import DataError


def folded(text: str) -> str:
    """`text` in one case and with single spaces, so that equal texts compare equal."""
    return " ".join(text.split()).casefold()


def in_share(text: str, share: float) -> bool:
    """Whether `text` falls into the given share of all texts; depends on the folded text alone, on every machine.

    Example:
        >>> sum(in_share(f"text {n}", 0.2) for n in range(1000))
        168
    """
    digest = hashlib.sha256(folded(text).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The sources of a data module's splits, as its settings name them."""

    owner: str
    """Class name of the data module, for messages."""
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    predict: str | None = None
    columns: Sequence[str] | None = None
    validation_share: float = 0.0

    def column_names(self, split: str) -> list[str] | None:
        """Columns of a split's source, or None where none is named."""
        field = self._field(split)
        source = getattr(self, field) if field else None
        return self._table(field, source).column_names if field and source else None

    def read(
        self, split: str, columns: Mapping[str, str], *, texts: Sequence[str], hold_out_by: Sequence[str]
    ) -> datasets.Dataset | None:
        """Rows of a split, or None where no source is named.

        Args:
            split: "train", "validation", "test" or "predict".
            columns: Columns that must exist, by the setting that names them.
            texts: Columns in which every row must have a text.
            hold_out_by: Columns whose hash decides what is held out; rows equal in them stay on one side.

        Raises:
            DataError: the source, a column or a text is missing.
        """
        field = self._field(split)
        source = getattr(self, field) if field else None
        if field is None or source is None:
            return None
        table = self._table(field, source)
        require_columns(table, source, columns)
        require_text(table, source, texts)
        if field == "train" and self.validation is None and self.validation_share:
            held_out = [self._is_held_out(row) for row in zip(*(table[name] for name in hold_out_by), strict=True)]
            chosen = [row for row, held in enumerate(held_out) if held == (split != "train")]
            if not chosen:
                raise DataError(
                    f"{self.owner}.validation_share is {self.validation_share}; of the {len(table)} training rows it"
                    f" leaves none for {split}. Name validation data, or set it to 0 to train without."
                )
            return table.select(chosen)
        return table

    def _table(self, field: str, source: str) -> datasets.Dataset:
        hub_split = "test" if field == "predict" else field
        return read_table(source, hub_split, columns=self.columns, field=f"{self.owner}.{field}")

    def _is_held_out(self, texts: Sequence[object]) -> bool:
        return in_share(" ".join(map(str, texts)), self.validation_share)

    def _field(self, split: str) -> str | None:
        """The setting that names the source of `split`: its own, or for validation and predict the next best."""
        held_out = "train" if self.validation_share else None
        validation = "validation" if self.validation else held_out
        if split == "validation":
            return validation
        if split == "predict" and not self.predict:
            return "test" if self.test else validation
        return split
