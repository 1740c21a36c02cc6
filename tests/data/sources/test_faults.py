"""Places of rows, and rows that are left out."""

from __future__ import annotations

import pytest

from lora_lightning.data.sources.faults import Faults, Places, RowError
from lora_lightning.errors import DataError


def test_places_tell_file_and_line():
    places = Places()
    first, second = places.start("d/a.csv", "line"), places.start("owner/name", "row")
    assert places.start("d/a.csv", "line") == first
    assert places.words(first + 12) == "a.csv, line 12"
    assert places.words(second) == "name, row 0 (counted from 0)"
    third = places.start("e/a.csv", "line")
    assert [places.words(first + 1), places.words(third + 1)] == ["d/a.csv, line 1", "e/a.csv, line 1"]


def test_a_fault_is_an_error_unless_such_rows_are_left_out():
    faults = Faults()
    place = faults.places.start("a.csv", "line") + 3
    with pytest.raises(
        DataError, match=r"^X\.label: a\.csv, line 3: it is empty\. data\.on_error: skip leaves such rows"
    ):
        faults.add("train", place, "without a label", "it is empty.", "X.label")
    assert faults.told("train") == ""
    assert issubclass(RowError, DataError)


def test_rows_left_out_are_counted_once_by_kind(caplog):
    faults = Faults("skip")
    start = faults.places.start("a.csv", "line")
    for line, kind in ((9, "without a label"), (4, "without a label"), (9, "without a label"), (5, "no JSON")):
        faults.add("train", start + line, kind, "why")
    assert faults.count("train") == 3
    assert faults.count("test") == 0
    assert faults.told("train") == "2 without a label (first: a.csv, line 4), 1 no JSON (first: a.csv, line 5)"
    assert caplog.text.count("left out: a.csv") == 2
