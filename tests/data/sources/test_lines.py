"""Lines that hold no row: which, why, and the file without them."""

from __future__ import annotations

import pytest

from lora_lightning.data.sources.lines import BadLines, bad_lines, copy_without, first_bad_line, has_lines, rows_of

FILES = {
    "x.csv": b'a,b\n1,x\n"3\n3",4,5\n2,y\n7,8,9\n\xff,z\n3,w\n',
    "x.tsv": b'a\tb\n1\t"x\n3\t4\t5\n2\ty\n',
    "x.jsonl": b'{"b": "x"}\n{"b": \n[1]\n\nnull\n{"b": "y"}\n{"b": "\xff"}\n',
    "x.json": b'{"b": "x"}\n{"b": "y"}\n{\n',
    "x.txt": b"one\n\n  \n\xff\ntwo\r\n",
}
BAD = {
    "x.csv": [(3, 4, "3 fields where there are 2 columns"), (6, 6, "3 fields"), (7, 7, "can't decode byte 0xff")],
    "x.tsv": [(3, 3, "3 fields where there are 2 columns")],
    "x.jsonl": [
        (2, 2, "Expecting value"),
        (3, 3, "a list, not an object of columns"),
        (5, 5, "a NoneType, not an object"),
        (7, 7, "can't decode byte 0xff"),
    ],
    "x.json": [(3, 3, "Expecting property name")],
    "x.txt": [(4, 4, "can't decode byte 0xff")],
}
GOOD = {
    "x.csv": [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}, {"a": "3", "b": "w"}],
    "x.tsv": [{"a": "1", "b": '"x'}, {"a": "2", "b": "y"}],
    "x.jsonl": [{"b": "x"}, {"b": "y"}],
    "x.json": [{"b": "x"}, {"b": "y"}],
    "x.txt": [{"text": "one"}, {"text": "two"}],
}


@pytest.fixture
def file(tmp_path):
    def file(name: str):
        (tmp_path / name).write_bytes(FILES[name])
        return tmp_path / name

    return file


@pytest.mark.parametrize("name", FILES)
def test_lines_and_reasons(file, name):
    found = bad_lines(file(name))
    assert [(bad.first, bad.last) for bad in found] == [(first, last) for first, last, _ in BAD[name]]
    assert all(reason in bad.reason for bad, (_, _, reason) in zip(found, BAD[name], strict=True))


@pytest.mark.parametrize("name", FILES)
def test_other_rows_are_read(file, name):
    assert [row for row in rows_of(file(name)) if not isinstance(row, BadLines)] == GOOD[name]


@pytest.mark.parametrize("name", FILES)
def test_a_copy_without_them_has_none_and_is_made_once(file, name):
    path = file(name)
    copy = copy_without(path, bad_lines(path))
    assert bad_lines(copy) == []
    assert [*rows_of(copy)] == GOOD[name]
    made = copy.stat().st_mtime_ns
    assert copy_without(path, bad_lines(path)) == copy
    assert copy.stat().st_mtime_ns == made
    assert path.read_bytes() == FILES[name]


def test_named_columns_take_the_first_line_for_a_row(tmp_path):
    (tmp_path / "x.csv").write_text("1,2\n3,4,5\n")
    rows = [*rows_of(tmp_path / "x.csv", ["a", "b"])]
    assert rows == [{"a": "1", "b": "2"}, BadLines(2, 2, "3 fields where there are 2 columns")]


def test_a_document_has_no_lines_and_names_where_it_breaks(tmp_path):
    document = tmp_path / "d.json"
    document.write_text(' [{"a": 1},\n {"a": ')
    assert not has_lines(document)
    assert [bad.first for bad in bad_lines(document)] == [2]
    document.write_text('[{"a": 1}]')
    assert bad_lines(document) == []
    assert bad_lines(tmp_path / "x.parquet") == []


def test_the_first_of_several_sources(file, tmp_path):
    (tmp_path / "good.jsonl").write_text('{"a": 1}\n')
    bad = file("x.jsonl")
    assert first_bad_line([str(tmp_path / "good.jsonl")]) == ""
    assert first_bad_line([str(tmp_path / "good.jsonl"), str(bad)]).startswith(f"{bad}, line 2: Expecting value")
    assert first_bad_line([str(tmp_path)]).startswith(f"{bad}, line 2: ")
