"""Values as text, and the types of columns: data are text until someone says otherwise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets

LONGEST = 4000
"""Digits of an integer from which on Python refuses to read it; longer ones stay text."""
SCALARS = {"bool": "bool", "int": "int64", "float": "float64", "str": "string"}
"""Type of a column whose values are all of one kind."""


class Literal(float):
    """A number of a JSON text with the digits that stand there."""

    text: str

    def __new__(cls, text: str) -> Literal:
        """The number with its text."""
        made = super().__new__(cls, text)
        made.text = text
        return made


def integer(text: str) -> int | str:
    """A whole number of a JSON text."""
    return int(text) if len(text) < LONGEST else text


def as_text(value: Any) -> str | None:
    """A value as text: a text as it is, a number with the digits of its file, the rest as JSON; None for none and NaN.

    Example:
        >>> [as_text(value) for value in ("02134", 0, False, 7.5, Literal("1.50"), {"a": [1]}, math.nan)]
        ['02134', '0', 'false', '7.5', '1.50', '{"a": [1]}', None]
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Literal):
        return value.text
    return json.dumps(value, ensure_ascii=False, default=str)


def kind_of(value: Any) -> str:
    """The kind of a value: "none", a scalar's, "list" with those of its members, or "other".

    Example:
        >>> [kind_of(value) for value in (True, 1, 1.5, Literal("1.50"), "a", ["a", 1], {"a": 1}, 2**80)]
        ['bool', 'int', 'float', 'other', 'str', 'list int str', 'other', 'other']
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "other"
    if isinstance(value, Literal):
        return "float" if repr(float(value)) == value.text else "other"
    if isinstance(value, float):
        return "float"
    if isinstance(value, str):
        return "str"
    if isinstance(value, list):
        members = sorted({kind_of(member) for member in value})
        scalars = all(member in SCALARS or member in ("none", "other") for member in members)
        nested = any(isinstance(member, list | dict) for member in value)
        return " ".join(["list", *members]) if scalars and not nested else "other"
    return "other"


def feature_of(kinds: Iterable[str]) -> Any:
    """The type of a column that holds values of these kinds: theirs where it is one, else text."""
    found = set(kinds) - {"none"}
    if found and all(kind.split()[0] == "list" for kind in found):
        members = {member for kind in found for member in kind.split()[1:]}
        return datasets.List(feature_of(members))
    (only,) = found if len(found) == 1 else ("str",)
    return datasets.Value(SCALARS.get(only, "string"))


def fitted(value: Any, feature: Any) -> Any:
    """A value as a column of that type holds it."""
    if isinstance(feature, datasets.Value):
        return as_text(value) if feature.dtype == "string" else value
    return None if value is None else [fitted(member, feature.feature) for member in value]


def texts_only(table: datasets.Dataset, columns: Iterable[str]) -> datasets.Dataset:
    """`table` with the values of those columns as texts."""
    for name in columns:
        if getattr(table.features[name], "dtype", "") in ("string", "large_string"):
            continue
        if declared_names(table.features[name]):
            table = names_only(table, name)
            continue
        column = [as_text(_plain(value)) for value in table[name][:]]
        table = _with(table, name, column, datasets.Value("string"))
    return table


def declared_names(feature: Any) -> list[str]:
    """The class names that a column declares for its numbers, or for those in its lists; none elsewhere."""
    inner = getattr(feature, "feature", feature)
    return list(inner.names) if isinstance(inner, datasets.ClassLabel) else []


def names_only(table: datasets.Dataset, name: str) -> datasets.Dataset:
    """`table` with class names in place of their numbers in a column that declares them; none where a number is not."""
    names = declared_names(table.features[name])

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(member) for member in value]
        return names[value] if value is not None and 0 <= value < len(names) else None

    text = datasets.Value("string")
    flat = isinstance(table.features[name], datasets.ClassLabel)
    return _with(table, name, [named(value) for value in table[name][:]], text if flat else datasets.List(text))


def _with(table: datasets.Dataset, name: str, column: list[Any], feature: Any) -> datasets.Dataset:
    """`table` with other values in one column."""
    names = table.column_names
    return table.remove_columns(name).add_column(name, column, feature=feature).select_columns(names)


def _plain(value: Any) -> Any:
    """A value without keys that have none, which tables give every object."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def distinct_rows(tables: Iterable[datasets.Dataset], columns: Sequence[str], identity: Callable[[object], str]) -> int:
    """How many rows of all tables differ in the columns, values being equal where `identity` is."""
    rows = (row for table in tables for row in zip(*(table[name][:] for name in columns), strict=True))
    return len({tuple(map(identity, row)) for row in rows})
