"""Values as text, and types of columns."""

from __future__ import annotations

import doctest

import datasets
import pytest

from lora_lightning.data.sources import texts
from lora_lightning.data.sources.texts import Literal, as_text, feature_of, fitted, integer, kind_of, texts_only


def test_examples_in_docstrings():
    assert doctest.testmod(texts) == (0, 2)  # failed, attempted


@pytest.mark.parametrize(
    ("values", "type_of", "stored"),
    [
        (["a", None], "string", ["a", None]),
        ([1, None, -5], "int64", [1, None, -5]),
        ([Literal("0.5"), Literal("1.25")], "float64", [0.5, 1.25]),
        ([Literal("1.50"), Literal("2.5")], "string", ["1.50", "2.5"]),
        ([True, False], "bool", [True, False]),
        ([1, "a"], "string", ["1", "a"]),
        ([1, Literal("2.5"), True], "string", ["1", "2.5", "true"]),
        ([2**70, 1], "string", [str(2**70), "1"]),
        ([{"a": 0}, "x"], "string", ['{"a": 0}', "x"]),
        ([None], "string", [None]),
    ],
)
def test_a_column_has_the_type_of_its_values_or_is_text(values, type_of, stored):
    feature = feature_of({kind_of(value) for value in values})
    assert feature.dtype == type_of
    assert [fitted(value, feature) for value in values] == stored


def test_lists_of_scalars_are_lists():
    for values, member, stored in (
        ([["a"], []], "string", [["a"], []]),
        ([[1], [2, 3], None], "int64", [[1], [2, 3], None]),
        ([[1, "a"], [None]], "string", [["1", "a"], [None]]),
    ):
        feature = feature_of({kind_of(value) for value in values})
        assert feature == datasets.List(datasets.Value(member))
        assert [fitted(value, feature) for value in values] == stored
    assert feature_of({kind_of([["a"]]), kind_of([{"a": 1}])}) == datasets.Value("string")


def test_integers_that_python_refuses_stay_text():
    assert integer("9" * 5000) == "9" * 5000
    assert as_text(integer("-17")) == "-17"


def test_columns_of_a_table_as_texts():
    features = datasets.Features(
        {
            "n": datasets.Value("int64"),
            "c": datasets.ClassLabel(names=["no", "yes"]),
            "s": {"a": datasets.Value("int64")},
        }
    )
    rows = {"n": [0, None], "c": [1, 0], "s": [{"a": 1}, {"a": None}]}
    table = texts_only(datasets.Dataset.from_dict(rows, features=features), ["n", "c", "s"])
    assert table.to_dict() == {"n": ["0", None], "c": ["yes", "no"], "s": ['{"a": 1}', "{}"]}


def test_rows_that_differ_are_counted_over_all_tables():
    tables = [
        datasets.Dataset.from_dict({"a": ["x", "X", "y"], "b": [1, 1, 1]}),
        datasets.Dataset.from_dict({"a": ["y"]}),
    ]
    assert texts.distinct_rows(tables, ["a"], str) == 3
    assert texts.distinct_rows(tables, ["a"], lambda value: str(value).lower()) == 2
    assert texts.distinct_rows(tables[:1], ["a", "b"], str) == 3
