"""Which labels there are, matched as text, and the number of each."""

from __future__ import annotations

import doctest
import math

import pytest

from lora_lightning.data import labels
from lora_lightning.data.labels import find_labels, named_labels, require_label, score
from lora_lightning.data.sources.faults import RowError
from lora_lightning.errors import DataError


def test_examples_in_docstrings():
    assert doctest.testmod(labels) == (0, 1)  # failed, attempted


def test_texts_are_sorted_and_numbers_keep_their_places():
    found = find_labels(["b", "a", "b"], "X")
    assert (found.names, found.encode(["b", "a"], "X")) == (["a", "b"], [1, 0])
    found = find_labels([str(n) for n in range(12)], "X")
    assert found.names == [str(n) for n in range(12)]
    assert find_labels([2, 0, 1.0], "X").encode([2, "0", 1], "X") == [2, 0, 1]
    assert find_labels([False, True], "X").names == ["false", "true"]


def test_star_ratings_are_names():
    """Numbers from 1 are the names that are listed, not places in the list; a list in another order swaps nothing."""
    assert named_labels(["1", "2", "3"]).encode([1, 2, 3, "3"], "X") == [0, 1, 2, 2]
    assert named_labels(["1", "0"]).encode([0, 1, "0"], "X") == [1, 0, 1]
    assert find_labels([5, 1, 3], "X").names == ["1", "3", "5"]


def test_given_names_serve_names_and_numbers():
    assert named_labels(["no", "yes"]).encode(["yes", 0, 1, "no", "1"], "X") == [1, 0, 1, 0, 1]


def test_a_value_that_is_no_label_is_named_with_the_nearest():
    with pytest.raises(RowError, match=r"^X: 'yse' is not a known label\. Did you mean \"yes\"\? Known: no, yes\.$"):
        named_labels(["no", "yes"]).encode(["no", "yse"], "X")


@pytest.mark.parametrize("value", [None, "", "  ", math.nan, "NaN"])
def test_an_empty_label_is_none(value):
    for judge in (lambda: require_label(value, "X"), lambda: named_labels(["a", "b"]).encode([value], "X")):
        with pytest.raises(
            RowError, match=r"^X: the label is (missing|'\s*', which is empty|(?i:nan), which is none)$"
        ) as error:
            judge()
        assert error.value.kind == "without a label"


def test_numbers_that_are_not_whole_may_be_a_scale():
    with pytest.raises(
        DataError, match=r"^X holds numbers such as 0\.5; .* regression: true\. .* list them in labels\.$"
    ):
        find_labels([0.5, "1"], "X")
    assert named_labels(["0.5", "1"]).encode([0.5, 1.0], "X") == [0, 1]


def test_classes_are_told_with_counts_and_doubts():
    found = find_labels(["Yes", "no", "yes", "yes ", "no", "maybe"], "X")
    assert found.told(["Yes", "no", "yes", "yes ", "no", "maybe"]) == (
        "Yes 1, maybe 1, no 2, yes 1, 'yes ' 1"
        " ('Yes' and 'yes' and 'yes ' differ in blanks and case alone: are they one class?)"
    )
    many = named_labels([f"c{n}" for n in range(20)])
    assert many.told(["c0"] * 3 + ["c1"]).endswith("c11 0, and 8 more, the rarest c2 0")


def test_scores_are_finite_numbers():
    assert [score(value, "X") for value in (1, 2.5, "3.5", "-1e2", " 4 ")] == [1.0, 2.5, 3.5, -100.0, 4.0]
    for value in ("high", True, "inf", float("inf")):
        with pytest.raises(RowError, match=r"^X: .* is not a number$"):
            score(value, "X")
    with pytest.raises(RowError, match=r"^X: the label is '', which is empty$"):
        score("", "X")


def test_a_class_that_is_listed_may_be_called_nan():
    assert named_labels(["nan", "roti"]).encode(["roti", "nan"], "X") == [1, 0]
