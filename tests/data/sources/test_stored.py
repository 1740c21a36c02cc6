"""Tables of files of text: kept by contents, and made again where those or the settings change."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_lightning.data.sources import stored
from lora_lightning.data.sources.lines import Reading
from lora_lightning.data.sources.stored import PLACE, features_of, text_table
from lora_lightning.errors import DataError


def test_rows_lines_and_what_cannot_be_read(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}\n\n{\n{"b": "x", "a": 2}\n')
    table, bad = text_table(file, Reading())
    assert table.to_dict() == {"a": [1, 2], "b": [None, "x"], PLACE: [1, 4]}
    assert [(one.first, one.kind) for one in bad] == [(3, "no JSON object")]
    again, bad_again = text_table(file, Reading())
    assert (again.to_dict(), bad_again) == (table.to_dict(), bad)
    assert list(features_of(file, Reading())) == ["a", "b", PLACE]


def test_a_table_is_kept_by_contents_and_settings(tmp_path, monkeypatch):
    file, other = tmp_path / "x.csv", tmp_path / "y.csv"
    file.write_text("a;b\n1;2\n")
    other.write_text("a;b\n1;2\n")
    text_table(file, Reading())
    monkeypatch.setattr(stored, "_write", lambda *_: pytest.fail("it was read again"))
    assert text_table(other, Reading())[0]["a;b"][:] == ["1;2"]
    monkeypatch.undo()
    assert text_table(file, Reading(separator=";"))[0]["b"][:] == ["2"]
    file.write_text("a;b\n1;3\n")
    assert text_table(file, Reading(separator=";"))[0]["b"][:] == ["3"]


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "x.csv").write_text("a\nhome\n")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(stored.datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "none"))
    table, bad = text_table(tmp_path / "x.csv", Reading())
    assert table.to_dict() == {"a": ["home"], PLACE: [2]}
    assert bad == []
    assert "is read into memory" in caplog.text


def test_plain_text_called_gz_is_not_taken_for_a_file_of_the_same_bytes_that_was_read_before(tmp_path):
    for name in ("x.csv", "x.csv.gz", "x.csv.bz2"):
        (tmp_path / name).write_bytes(b"a,b\n1,2\n")
    assert len(text_table(tmp_path / "x.csv", Reading())[0]) == 1
    with pytest.raises(DataError, match="cannot be read: Not a gzipped file"):
        text_table(tmp_path / "x.csv.gz", Reading())
    with pytest.raises(DataError, match="cannot be read: Invalid data stream"):
        text_table(tmp_path / "x.csv.bz2", Reading())
