"""Where images and sounds stand in the turns of a conversation: parts of content, or marks in texts with a column."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_lightning.data.chats.turns import PARTS, Turn, text_content
from lora_lightning.data.sources.faults import RowError

KINDS = {"image": ("image", "images"), "audio": ("audio", "audios")}
"""What a part of content may be beside text, and the columns that hold what such parts leave open."""
COLUMNS = tuple(name for names in KINDS.values() for name in names)
_MARK = re.compile("(" + "|".join(f"<{kind}>" for kind in KINDS) + ")")
_VALUES = ("path", "url", "base64", "bytes", "array")
"""Keys of a part that hold its image or sound, beside the one called as its type is."""


@dataclass(frozen=True)
class Media:
    """An image or a sound of a conversation."""

    kind: str
    """A key of `KINDS`."""
    value: Any = field(default=None, repr=False)
    """A path, a data URL, bytes, what `datasets` holds of one, or an object of Pillow; None takes the column's next."""
    number: int = -1
    """Its place among those of its row."""
    folder: Path | None = field(default=None, repr=False)
    """What a path is relative to."""


def parts_of(content: Any, where: str) -> list[dict[str, Any]] | None:
    """Content as parts, of which those of images and sounds hold a `Media`; None where there is no content.

    A text is cut at <image> and <audio>.

    Raises:
        RowError: a part of another type, or one of text without a text.
    """
    if isinstance(content, list):
        return [_part(part, where) for part in content]
    text = text_content(content, where)
    return None if text is None else [_marked(piece) for piece in _MARK.split(text) if piece]


def with_media(turns: Sequence[Turn], row: Mapping[str, Any], folder: Path | None, where: str) -> list[Turn]:
    """The turns with all images and sounds, numbered as they come; those that parts leave open are of the columns.

    Args:
        turns: With content in parts.
        row: With the columns.
        folder: What paths are relative to.
        where: What to call the row in messages.

    Raises:
        RowError: a column holds more of them, or fewer, than the turns leave open.
    """
    columns = {kind: _listed(row, names) for kind, names in KINDS.items()}
    for kind, values in columns.items():
        wanted = sum(one.kind == kind and one.value is None for one in media_in(turns))
        if wanted != len(values):
            raise RowError(
                f"with another number of {kind} marks than of {KINDS[kind][1]}",
                f'{where}: the turns have {wanted} <{kind}> marks or {{"type": "{kind}"}} parts without a value, and '
                f"the columns {' and '.join(KINDS[kind])} hold {len(values)}. Each mark takes the column's next",
            )
    left, numbers = {kind: iter(values) for kind, values in columns.items()}, iter(range(1 << 30))

    def filled(part: dict[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        if kind not in KINDS:
            return part
        media = part[kind]
        value = next(left[kind]) if media.value is None else media.value
        return {"type": kind, kind: replace(media, value=value, number=next(numbers), folder=folder)}

    return [
        {**turn, "content": [filled(part) for part in turn["content"]]} if isinstance(turn["content"], list) else turn
        for turn in turns
    ]


def media_in(turns: Sequence[Turn]) -> Iterator[Media]:
    """Images and sounds in the order of the turns."""
    for turn in turns:
        for part in turn["content"] if isinstance(turn["content"], list) else ():
            if part["type"] in KINDS:
                yield part[part["type"]]


def marked(text: str, row: Mapping[str, Any]) -> str:
    """A text with a mark for each image and sound of a row's columns in front, unless it has marks itself."""
    if _MARK.search(text):
        return text
    return "".join(f"<{kind}>" * len(_listed(row, names)) for kind, names in KINDS.items()) + text


def column_with_media(row: Mapping[str, Any]) -> str | None:
    """The first column of a row that holds an image or a sound; None where none does."""
    return next((name for name in COLUMNS if _listed(row, [name])), None)


def named(value: Any) -> Any:
    """A value with images and sounds by name."""
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return value.get("path") or f"{len(value['bytes'])} bytes"
    if isinstance(value, Mapping):
        return {key: named(inner) for key, inner in value.items()}
    return [named(inner) for inner in value] if isinstance(value, list) else value


def _marked(piece: str) -> dict[str, Any]:
    kind = piece[1:-1] if _MARK.fullmatch(piece) else ""
    return {"type": kind, kind: Media(kind)} if kind else {"type": "text", "text": piece}


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    kind = str(given.get("type", "text" if "text" in given else "nothing"))
    kind = kind.removesuffix("_url")
    if kind == "text" and isinstance(given.get("text"), str):
        return {"type": "text", "text": given["text"]}
    if kind not in KINDS:
        what = "text without a text" if kind == "text" else f"type {kind}"
        raise RowError(PARTS, f"{where}: its content has a part of {what}; parts are text, {' or '.join(KINDS)}")
    value = next((given[key] for key in (kind, f"{kind}_url", *_VALUES) if key in given), None)
    if isinstance(value, Mapping) and "url" in value:  # as OpenAI's API has them
        value = value["url"]
    return {"type": kind, kind: Media(kind, value)}


def _listed(row: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """What the columns hold, in their order."""
    found: list[Any] = []
    for name in names:
        value = row.get(name)
        found += list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    return [value for value in found if value is not None]
