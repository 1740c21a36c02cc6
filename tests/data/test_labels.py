"""Which labels there are, and the number of each."""

from __future__ import annotations

import datasets
import pytest

from lora_lightning.data.labels import find_labels, named_labels, scores
from lora_lightning.errors import DataError


def test_strings_are_sorted():
    labels = find_labels(["b", "a", "b"], datasets.Value("string"), "X")
    assert labels.names == ["a", "b"]
    assert labels.encode(["b", "a"], "X") == [1, 0]


def test_numbers_keep_their_places():
    labels = find_labels([2, 0, 1], datasets.Value("int64"), "X")
    assert labels.names == ["0", "1", "2"]
    assert labels.encode([2, 0], "X") == [2, 0]


def test_declared_names_come_before_what_is_found():
    labels = find_labels([1, 1], datasets.ClassLabel(names=["x", "y", "z"]), "X")
    assert labels.names == ["x", "y", "z"]


def test_given_names_serve_names_and_numbers():
    assert named_labels(["no", "yes"]).encode(["yes", 0, 1, "no"], "X") == [1, 0, 1, 0]


def test_a_value_that_is_no_label_is_named_with_its_row():
    with pytest.raises(DataError, match=r"^X, row 1 \(counted from 0\): 'yse' is not .*Did you mean \"yes\"\? Known:"):
        named_labels(["no", "yes"]).encode(["no", "yse"], "X")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], r"^X holds the numbers 1, 2; class numbers must run from 0 to n - 1 without gaps\.$"),
        ([0.5, 1.0], r"^X holds 0\.5; classes are whole numbers or strings\. .* set regression: true\.$"),
        (["x", 1], r"^X holds 1; classes are whole"),
        (["x", None], r"^X is missing in row 1, counted from 0\.$"),
    ],
)
def test_values_that_are_no_classes(values, message):
    with pytest.raises(DataError, match=message):
        find_labels(values, None, "X")


def test_scores_are_floats():
    found = scores([1, 2.5], "X")
    assert found == [1.0, 2.5]
    assert {type(value) for value in found} == {float}
    with pytest.raises(DataError, match=r"^X, row 1 \(counted from 0\): 'high' is not a number\.$"):
        scores([1, "high"], "X")
