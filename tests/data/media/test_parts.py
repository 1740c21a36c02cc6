"""Images and sounds in turns: marks, parts, columns, and numbers that do not agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_lightning.data.media.parts import media_in, parts_of, with_media
from lora_lightning.data.sources.faults import RowError


def turns(*contents):
    return [{"role": "user", "content": parts_of(content, "it")} for content in contents]


def kinds(parts):
    return [part["type"] for part in parts]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<image>what?", ["image", "text"]),
        ("a <image> and <image>", ["text", "image", "text", "image"]),
        ("hear <audio>", ["text", "audio"]),
        ("<video> is text", ["text"]),
        ([{"type": "image"}, {"type": "text", "text": "what?"}], ["image", "text"]),
        ([{"type": "image_url", "image_url": {"url": "data:x"}}, "what?"], ["image", "text"]),
        ([{"text": "no type", "image": None}], ["text"]),
        ("", []),
    ],
)
def test_content_in_parts(content, expected):
    assert kinds(parts_of(content, "it")) == expected


def test_no_content_is_no_parts():
    assert parts_of(None, "it") is None


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"type": "video", "video": "a.mp4"},
            "it: its content has a part of type video; parts are text, image or audio",
        ),
        ({"type": "text"}, "a part of text without a text"),
        (7, "a part of type nothing"),
    ],
)
def test_a_part_of_another_type_is_refused(part, message):
    with pytest.raises(RowError, match=message):
        parts_of([part], "it")


def test_columns_fill_what_parts_leave_open():
    given = turns("<image>", [{"type": "image", "image": "own.png"}, {"type": "image"}], "<audio>")
    row = {"images": ["a.png", "b.png"], "audio": {"bytes": b"x"}}
    found = list(media_in(with_media(given, row, Path("here"), "it")))
    assert [one.value for one in found] == ["a.png", "own.png", "b.png", {"bytes": b"x"}]
    assert [one.number for one in found] == [0, 1, 2, 3]
    assert {one.folder for one in found} == {Path("here")}


@pytest.mark.parametrize(
    ("content", "row", "message"),
    [
        (
            "what?",
            {"image": "a.png"},
            r"have 0 <image> marks .* image and images hold 1\. Each mark takes the column's next",
        ),
        ("<image><image>", {"images": ["a.png"]}, "have 2 <image> marks .* hold 1"),
        ("<audio>", {}, "have 1 <audio> marks .* audio and audios hold 0"),
    ],
)
def test_marks_and_values_of_another_number_are_refused(content, row, message):
    with pytest.raises(RowError, match=message):
        with_media(turns(content), row, None, "it")
