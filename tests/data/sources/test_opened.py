"""Files of text: compression, encoding, byte order marks."""

from __future__ import annotations

import bz2
import gzip
import lzma

import pyarrow
import pytest

from lora_lightning.data.sources.opened import encoding_of, foreign_byte, open_bytes, open_text, same_files, suffix_of
from lora_lightning.errors import DataError

TEXT = "name\nJos\u00e9 \u20ac\n"


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_packed_files(tmp_path, suffix, pack):
    file = tmp_path / f"x.csv{suffix}"
    file.write_bytes(pack(TEXT.encode() * 9999))
    with open_bytes(file) as opened:
        assert opened.read() == TEXT.encode() * 9999
    with open_text(file, "utf-8", "\n") as opened:
        assert next(opened) == "name\n"
    assert suffix_of(file) == ".csv"


@pytest.mark.parametrize(
    ("codec", "setting", "found"),
    [
        ("utf-8", None, "utf-8"),
        ("utf-8-sig", None, "utf-8-sig"),
        ("utf-8-sig", "utf-8", "utf-8-sig"),
        ("utf-16", None, "utf-16"),
        ("utf-32", None, "utf-32"),
        ("utf-16-be", "UTF-16BE", "utf-16-be"),
        ("cp1252", "cp1252", "cp1252"),
        ("cp1252", "windows-1252", "cp1252"),
    ],
)
def test_encodings(tmp_path, codec, setting, found):
    file = tmp_path / "x.csv"
    file.write_bytes(TEXT.encode(codec))
    assert encoding_of(file, setting) == found
    with open_text(file, found, "\n") as opened:
        assert opened.read() == TEXT


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_named(tmp_path, codec):
    (tmp_path / "x.csv").write_bytes(TEXT.encode(codec))
    with pytest.raises(DataError, match=rf"^x\.csv holds zero bytes .* set data\.encoding: {codec}\.$"):
        encoding_of(tmp_path / "x.csv", None)


def test_no_such_encoding(tmp_path):
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(
        DataError, match=r'^data\.encoding is "utf-9"; there is no such encoding\. Usual: utf-8, utf-16'
    ):
        encoding_of(tmp_path / "x.csv", "utf-9")


def test_bytes_of_another_encoding_are_named():
    text = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert foreign_byte(text, "utf-8") == (
        "byte 0xe9 is no utf-8; set data.encoding to the file's encoding: cp1252 (Windows, Excel) is usual"
    )
    assert "it was read as cp1252" in foreign_byte(b"\x81".decode("cp1252", "surrogateescape"), "cp1252")
    assert foreign_byte(TEXT, "utf-8") == foreign_byte("plain", "utf-8") == ""


def test_files_that_two_name(tmp_path, monkeypatch):
    """Under any path to them; folders have splits of their own."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "three"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("one")
    found = same_files(["one", str(tmp_path / "two"), "folder", "owner/name"], ["link", "./two", "three", "folder"])
    assert found == [str(tmp_path.resolve() / name) for name in ("one", "two")]
