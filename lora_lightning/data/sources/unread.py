"""Columns and keys that are not read here, by which other tools weigh, mask or leave out what is learned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_lightning.data.sources.faults import RowError

Kind = Literal["weight", "flag", "mask", "unclear mask", "verdict", "other", "value"]
PATTERNS: tuple[tuple[str, Kind], ...] = (
    (r"(sample|example|row|instance|case|turn|token|loss|class|train|training)?weights?|lossscale", "weight"),
    (r"(is|do)?(train|trained|trainable|training|learn|learned|learnable)|usefortraining", "flag"),
    (r"(train|training|loss|labels?|target|completion|response|answer|assistants?)masks?", "mask"),
    (r"masks?|masked|prompt_?masks?|inputmasks?|maskhistory|train(ing)?details?", "unclear mask"),
)
"""Kinds by what a name, in small letters and without marks, matches."""
MEANING = {
    "weight": "every example counts alike",
    "flag": "every example is learned",
    "mask": "the mask of what is learned is made here",
    "unclear mask": "the mask of what is learned is made here",
    "verdict": "every example is learned, good or not",
    "other": "nothing is compared",
    "value": "it would change what is learned",
}
TRUTH = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}


@dataclass(frozen=True)
class Changing:
    """A column that changes what is learned where it holds what its kind says.

    Args:
        kind: A weight other than 1; a flag that is false; a mask with a gap; an unclear mask, of which nobody knows
            what 1 means; a verdict that is false, but not 0; what an answer is compared with; any value.
        advice: What to do, in place of leaving the rows out.
    """

    kind: Kind
    advice: str = ""

    def changes(self, value: Any) -> bool:
        """Whether `value` would change what is learned."""
        if value is None or value == "" or (isinstance(value, list | Mapping) and not value):
            return False
        if self.kind in ("other", "value"):
            return True
        if isinstance(value, list):
            return self.kind == "unclear mask" or any(self.changes(one) for one in value)
        text = str(value).strip().lower()
        if self.kind == "weight":
            return _number(text) not in (None, 1.0)
        if self.kind == "verdict":
            return text == "false"
        return text in TRUTH and (self.kind == "unclear mask" or not TRUTH[text])


_COMPARING = "Preferences learns such rows (data: Preferences)"
COMPARED = {
    "label": Changing("verdict", _COMPARING),
    "kto_tag": Changing("verdict", _COMPARING),
    "rejected": Changing("other", _COMPARING),
}
"""Columns that say which completion is better, or whether one is good."""


def kind_of(name: str) -> Kind | None:
    """What other tools take a column or a key of that name for; None for other names.

    Example:
        >>> kind_of("sample_weight"), kind_of("lossMask"), kind_of("text")
        ('weight', 'mask', None)
    """
    letters = re.sub(r"[^a-z]", "", name.casefold())
    return next((kind for pattern, kind in PATTERNS if re.fullmatch(pattern, letters)), None)


@dataclass(frozen=True)
class Unread:
    """The columns of a table that would change what is learned, and are not read.

    Args:
        owner: Class name of the data module.
        columns: What they change, by name.
    """

    owner: str
    columns: dict[str, Changing] = field(default_factory=dict)

    @classmethod
    def of(
        cls, owner: str, there: Iterable[str], used: Iterable[str], more: Mapping[str, Changing], learned: bool
    ) -> Unread:
        """Those of the columns `there` that are not `used`.

        Args:
            owner: Class name of the data module.
            there: The columns of a table.
            used: Columns that are read.
            more: Columns that change what is learned by this data module, beside those that do everywhere.
            learned: Whether the rows are learned or measured; otherwise only values count.
        """
        found = {}
        for name in sorted(set(there) - set(used)):
            kind = kind_of(name)
            changing = more.get(name) or (Changing(kind) if kind else None)
            if changing is not None and (learned or changing.kind == "value"):
                found[name] = changing
        return cls(owner, found)

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Raise `RowError` for a row that they would change."""
        for name, changing in self.columns.items():
            if changing.changes(row.get(name)):
                what = "a value" if changing.kind in ("other", "value") else f"{row[name]!s:.40}"
                advice = changing.advice or "Remove such rows"
                raise RowError(
                    f'with a value in "{name}"',
                    f'{self.owner} has {what} in the column "{name}", which it does not read: '
                    f"{MEANING[changing.kind]}. {advice}, or set data.ignore to [{name}] to learn them all the same",
                )


def refuse_keys(keys: Mapping[str, Any], where: str) -> None:
    """Raise `RowError` for keys of a turn that would change what is learned."""
    for name, value in keys.items():
        kind = kind_of(name)
        if kind is not None and Changing(kind).changes(value):
            raise RowError(
                f'with a key "{name}"',
                f"{where} has {name}: {value!r:.60}, which is not read. Write weight: 0 or train: false into a turn of "
                "the assistant that is not to be learned",
            )


def _number(text: str) -> float | None:
    if text in TRUTH:
        return float(TRUTH[text])
    try:
        return float(text)
    except ValueError:
        return None
