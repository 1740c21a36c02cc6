"""Files of text as people have them: compressed, in any encoding, with or without a byte order mark."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from lora_lightning.errors import DataError

PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Compressions by the last suffix."""
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, and the encoding that each tells."""


def suffix_of(path: Path) -> str:
    """The suffix that tells the format, in small letters: ".csv" of x.csv and of x.CSV.gz."""
    inner = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return inner.suffix.lower()


def open_bytes(path: Path) -> BinaryIO:
    """What a file holds, unpacked.

    Raises:
        DataError: its compression cannot be read here.
    """
    packed = PACKED.get(path.suffix.lower())
    if packed == "gzip":
        return cast(BinaryIO, gzip.open(path))
    if packed == "bzip2":
        return cast(BinaryIO, bz2.open(path))
    if packed == "xz":
        return cast(BinaryIO, lzma.open(path))
    if packed == "zstd":
        import pyarrow  # type: ignore[import-untyped]  # it comes with datasets

        if not pyarrow.Codec.is_available("zstd"):
            raise DataError(f"{path.name}: this pyarrow has no zstd; unpack the file with zstd -d.")
        return cast(BinaryIO, io.BufferedReader(_Raw(pyarrow.input_stream(str(path), compression="zstd"))))
    return path.open("rb")


def encoding_of(path: Path, setting: str | None) -> str:
    """The encoding of a file: the one that is set, else what its byte order mark tells, else UTF-8.

    Raises:
        DataError: there is no such encoding, or the file looks like UTF-16 without a mark.
    """
    with open_bytes(path) as file:
        start = file.read(400)
    told = next((name for mark, name in MARKS if start.startswith(mark)), None)
    if setting is None:
        if told is None and b"\0" in start:
            guess = "utf-16-le" if start[1::2].count(0) > start[::2].count(0) else "utf-16-be"
            raise DataError(
                f"{path.name} holds zero bytes and no text in UTF-8; if it is UTF-16, set data.encoding: {guess}."
            )
        return "utf-8-sig" if told == "utf-8" else told or "utf-8"
    try:
        name = codecs.lookup(setting).name
    except LookupError as error:
        raise DataError(
            f'data.encoding is "{setting}"; there is no such encoding. Usual: utf-8, utf-16, cp1252.'
        ) from error
    return "utf-8-sig" if name == told == "utf-8" else name


def open_text(path: Path, encoding: str, newline: str) -> TextIO:
    """The text of a file; bytes that are none in its encoding are read as lone surrogates."""
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, errors="surrogateescape", newline=newline)


def foreign_byte(text: str, encoding: str) -> str:
    """Why `text` was not wholly in `encoding`: its first byte that is none, with what helps; "" where all is well."""
    if text.isascii():
        return ""
    byte = next((ord(letter) - 0xDC00 for letter in text if 0xDC80 <= ord(letter) <= 0xDCFF), None)
    if byte is None:
        return ""
    name = encoding.removesuffix("-sig")
    other = "cp1252 (Windows, Excel) is usual" if name == "utf-8" else f"it was read as {name}"
    return f"byte 0x{byte:02x} is no {name}; set data.encoding to the file's encoding: {other}"


def same_files(one: Iterable[str], other: Iterable[str]) -> list[str]:
    """Files, absolute and sorted, that both name; a folder or a name on the hub has splits of its own."""
    try:
        both = [{path.resolve() for path in map(Path, names) if path.is_file()} for names in (one, other)]
    except OSError:  # a name that can be none, such as a far too long one, is told where it is read
        return []
    return sorted(map(str, both[0] & both[1]))


class _Raw(io.RawIOBase):
    """A stream of pyarrow, as Python's buffers take it."""

    def __init__(self, stream: object) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        part: bytes = self._stream.read(len(view))  # type: ignore[attr-defined]
        view[: len(part)] = part
        return len(part)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()  # type: ignore[attr-defined]
        super().close()
