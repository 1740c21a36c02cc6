"""The labels of a classification: which there are, and the number that each value stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from lora_lightning.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Labels:
    """Names by class number, and class number by value in the data (a name, or the number itself)."""

    names: list[str]
    ids: Mapping[Any, int]

    def encode(self, values: Sequence[Any], where: str) -> list[int]:
        """Class numbers of `values`.

        Args:
            values: Values of a label column.
            where: Split and column, for messages.

        Raises:
            DataError: a value that is not among the labels, with its row counted from 0 and the nearest label.
        """
        for row, value in enumerate(values):
            if value not in self.ids:
                raise DataError(
                    f"{where}, row {row} (counted from 0): {value!r} is not a known label."
                    f"{did_you_mean(str(value), self.names)} Known: {', '.join(self.names)}."
                )
        return [self.ids[value] for value in values]


def find_labels(column: Sequence[Any], feature: object, where: str) -> Labels:
    """The labels of a training column: class names that the data set declares, numbers from 0, or sorted strings.

    Raises:
        DataError: missing values, numbers that do not run from 0, or values that are neither.
    """
    if isinstance(feature, datasets.ClassLabel):
        return named_labels(feature.names)
    values = set(column)
    if None in values:
        raise DataError(f"{where} is missing in row {list(column).index(None)}, counted from 0.")
    if all(isinstance(value, str) for value in values):
        names = sorted(values)
        return Labels(names, {name: number for number, name in enumerate(names)})
    if not all(isinstance(value, int) for value in values):
        raise DataError(
            f"{where} holds {sorted(values, key=str)[0]!r}; classes are whole numbers or strings."
            " For numbers on a scale set regression: true."
        )
    if values != set(range(len(values))):
        found = ", ".join(map(str, sorted(values)[:8]))
        raise DataError(f"{where} holds the numbers {found}; class numbers must run from 0 to n - 1 without gaps.")
    return Labels([str(number) for number in range(len(values))], {number: number for number in range(len(values))})


def named_labels(names: Sequence[str]) -> Labels:
    """Labels with given names, which the data may also hold as numbers."""
    numbers = range(len(names))
    return Labels(list(names), {**dict(zip(names, numbers, strict=True)), **{number: number for number in numbers}})


def scores(values: Sequence[Any], where: str) -> list[float]:
    """The values of a regression as floats.

    Raises:
        DataError: a value that is no number, with its row counted from 0.
    """
    for row, value in enumerate(values):
        if not isinstance(value, int | float):
            raise DataError(f"{where}, row {row} (counted from 0): {value!r} is not a number.")
    return [float(value) for value in values]
