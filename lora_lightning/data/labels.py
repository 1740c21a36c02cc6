"""The labels of a classification, matched as text: which there are, and the number that each value stands for."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.sources.texts import as_text
from lora_lightning.errors import DataError, did_you_mean

WHOLE = re.compile(r"[+-]?\d+")
SHOWN = 12
"""Classes that are told with their counts."""


@dataclass(frozen=True)
class Labels:
    """Names by class number, and class number by the text in the data: a name, or the number itself."""

    names: list[str]
    ids: Mapping[str, int]

    def find(self, value: Any) -> int | None:
        """The class number of a value; None for one that is no label."""
        if isinstance(value, str) and value in self.ids:  # also one that is listed as "nan"
            return self.ids[value]
        text = label_text(value)
        return None if text is None else self.ids.get(text)

    def encode(self, values: Iterable[Any], where: str) -> list[int]:
        """Class numbers of `values`.

        Args:
            values: Values of a label column.
            where: Setting and column, for messages.

        Raises:
            RowError: a value that is empty, or is not among the labels, with the nearest one.
        """
        numbers = []
        for value in values:
            number = self.find(value)
            if number is None:
                require_label(value, where)
                known = ", ".join(self.names[:50]) + (", ..." if len(self.names) > 50 else "")
                raise RowError(
                    "with an unknown label",
                    f"{where}: {value!r} is not a known label.{did_you_mean(str(value), self.names)} Known: {known}.",
                )
            numbers.append(number)
        return numbers

    def told(self, values: Iterable[Any]) -> str:
        """Classes with their counts among `values`, and those that differ in blanks and case alone, in one line."""
        counts = Counter(map(self.find, values))
        shown = [f"{_quoted(name)} {counts[number]}" for number, name in enumerate(self.names[:SHOWN])]
        if len(self.names) > SHOWN:
            rarest = min(range(len(self.names)), key=lambda number: counts[number])
            shown.append(
                f"and {len(self.names) - SHOWN} more, the rarest {_quoted(self.names[rarest])} {counts[rarest]}"
            )
        alike = defaultdict(list)
        for name in self.names:
            alike[" ".join(name.split()).casefold()].append(name)
        doubts = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
        doubt = f" ({'; '.join(doubts)} differ in blanks and case alone: are they one class?)" if doubts else ""
        return ", ".join(shown) + doubt


def label_text(value: Any) -> str | None:
    """A label as text; None where it is missing, empty or NaN.

    Example:
        >>> [label_text(value) for value in ("yes ", 1, 1.0, True, " ", float("nan"), "NaN")]
        ['yes ', '1', '1', 'true', None, None, None]
    """
    whole = isinstance(value, float) and value.is_integer()
    text = as_text(int(value) if whole else value)
    return text if text and text.strip().lower() not in ("", "nan") else None


def require_label(value: Any, where: str) -> None:
    """Raise `RowError` for a value that is missing, empty or NaN."""
    if label_text(value) is None:
        blank = isinstance(value, str) and not value.strip()
        what = "missing" if value is None else f"{value!r}, which is empty" if blank else f"{value}, which is none"
        raise RowError("without a label", f"{where}: the label is {what}")


def find_labels(column: Iterable[Any], where: str) -> Labels:
    """The labels of a training column: its texts in order.

    Whole numbers are in the order of numbers, so that those from 0 keep their places.

    Raises:
        DataError: numbers that are not whole, which may be on a scale.
    """
    texts = {text for value in column if (text := label_text(value)) is not None}
    if texts and all(WHOLE.fullmatch(text) for text in texts):
        names = sorted(texts, key=lambda text: (int(text), text))
    else:
        names = sorted(texts)
        if texts and all(map(_is_number, texts)):
            broken = next(text for text in names if not WHOLE.fullmatch(text))
            raise DataError(
                f"{where} holds numbers such as {broken}; for numbers on a scale set regression: true. To take them as"
                " names, list them in labels."
            )
    return Labels(names, {name: number for number, name in enumerate(names)})


def named_labels(names: Sequence[str]) -> Labels:
    """Labels with given names, which the data may also hold as numbers, unless a name is a number itself."""
    ids = {str(name): number for number, name in enumerate(names)}
    if not any(WHOLE.fullmatch(name) for name in ids):
        ids = {**{str(number): number for number in range(len(names))}, **ids}
    return Labels([str(name) for name in names], ids)


def score(value: Any, where: str) -> float:
    """The value of a regression as a float.

    Raises:
        RowError: it is missing, or no finite number.
    """
    text = label_text(value)
    if text is None:
        require_label(value, where)
    number = float(text) if text is not None and not isinstance(value, bool) and _is_number(text) else math.nan
    if not math.isfinite(number):
        raise RowError("with a label that is no number", f"{where}: {value!r} is not a number")
    return number


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _quoted(name: str) -> str:
    return name if name == name.strip() else repr(name)
