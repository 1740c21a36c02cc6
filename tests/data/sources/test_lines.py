"""Rows and their lines: which can be read, which cannot and why."""

from __future__ import annotations

import pytest

from lora_lightning.data.sources.lines import (
    BadLines,
    Numbered,
    Reading,
    has_lines,
    is_document,
    lone_separator,
    rows_of,
)
from lora_lightning.errors import DataError

FILES = {
    "x.csv": b'a,b\n1,x\n"3\n3",4,5\n2,y\n7,8,9\n\xff,z\n3,w\n4,v,\n5\n\n"6,\nu\n',
    "x.tsv": b'a\tb\n1\t"x\n3\t4\t5\n2\ty\n',
    "x.jsonl": b'{"b": "x"}\n{"b": \n[1]\n\nnull\n{"b": "y"}\n{"b": "\xff"}\n{"b": 1, "b": 2}\n{"b": "\\ud800"}\n',
    "x.json": b'{"b": "x"}\n{"b": "y"}\n{\n',
    "x.txt": b"one\n\n  \n\xff\ntwo\r\n",
}
BAD = {
    "x.csv": [
        (3, 4, "3 fields where there are 2 columns"),
        (6, 6, "3 fields"),
        (7, 7, "byte 0xff is no utf-8; set data.encoding"),
        (12, 13, "a quote that opens here is never closed"),
    ],
    "x.tsv": [(3, 3, "3 fields where there are 2 columns")],
    "x.jsonl": [
        (2, 2, "Expecting value in column"),
        (3, 3, "a list, not an object of columns"),
        (5, 5, "a NoneType, not an object"),
        (7, 7, "byte 0xff is no utf-8"),
        (8, 8, 'the key "b" stands twice'),
        (9, 9, "half of a surrogate pair"),
    ],
    "x.json": [(3, 3, "Expecting property name")],
    "x.txt": [(4, 4, "byte 0xff is no utf-8")],
}
GOOD = {
    "x.csv": [(2, "1", "x"), (5, "2", "y"), (8, "3", "w"), (9, "4", "v"), (10, "5", None)],
    "x.tsv": [(2, "1", '"x'), (4, "2", "y")],
    "x.jsonl": [(1, "x"), (6, "y")],
    "x.json": [(1, "x"), (2, "y")],
    "x.txt": [(1, "one"), (5, "two")],
}


@pytest.mark.parametrize("name", FILES)
def test_lines_rows_and_reasons(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    found = list(rows_of(tmp_path / name))
    bad = [row for row in found if isinstance(row, BadLines)]
    assert [(one.first, one.last) for one in bad] == [(first, last) for first, last, _ in BAD[name]]
    assert all(reason in one.reason for one, (_, _, reason) in zip(bad, BAD[name], strict=True))
    assert [(row.line, *row.row.values()) for row in found if isinstance(row, Numbered)] == GOOD[name]


def test_named_columns_take_the_first_line_for_a_row(tmp_path):
    (tmp_path / "x.csv").write_text("1,2\n3,4,5\n")
    rows = [*rows_of(tmp_path / "x.csv", Reading(columns=("a", "b")))]
    assert rows[0] == Numbered(1, {"a": "1", "b": "2"})
    assert isinstance(rows[1], BadLines)
    assert rows[1].reason == "3 fields where there are 2 columns"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1}, {"a": 2}]', [(0, 1), (1, 2)]),  # on one line rows are counted
        ('\n[\n  {"a": 1},\n\n  {"a":\n 2}\n]\n', [(3, 1), (5, 2)]),
        ('{"a": [1, 2], "b": [3, 4]}', [(1, [1, 2])]),  # one row a line
        ('{\n"a": [1, 2],\n"b": [3, 4]\n}', [(0, 1), (1, 2)]),  # a list for each column
        ("[]", []),
    ],
)
def test_documents(tmp_path, text, expected):
    file = tmp_path / "d.json"
    file.write_text(text)
    assert [(row.line, row.row["a"]) for row in rows_of(file)] == expected
    assert is_document(file) == (text[:2] != '{"')


def test_documents_that_break(tmp_path):
    file = tmp_path / "d.json"
    for text, line, reason in (
        (' [{"a": 1},\n {"a": ', 2, "Expecting value"),
        ('[{"a": 1}\n{"a": 2}]', 2, "Expecting ','"),
    ):
        file.write_text(text)
        good, bad = rows_of(file)
        assert (good.row, bad.first) == ({"a": 1}, line)
        assert reason in bad.reason
    file.write_text('{\n"version": 2,\n"data": [{"a": 1}]}')
    with pytest.raises(
        DataError, match=r"^d\.json is one object \(version, data\); it must be a list of rows, or hold"
    ):
        list(rows_of(file))


def test_columns_of_one_name(tmp_path):
    (tmp_path / "x.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(DataError, match=r'^x\.csv: two columns are called "a"; rename one of them\.$'):
        list(rows_of(tmp_path / "x.csv"))


def test_a_separator_that_was_not_used():
    assert lone_separator(["a;b"]) == ";"
    assert lone_separator(["a;b"], ";") == ""
    assert lone_separator(["a", "b;c"]) == ""


def test_formats(tmp_path):
    names = ["a.csv", "a.TSV.gz", "a.jsonl.zst", "a.json", "a.txt.xz", "a.parquet", "a.csv.zip"]
    assert [has_lines(tmp_path / name) for name in names] == [True] * 5 + [False] * 2
