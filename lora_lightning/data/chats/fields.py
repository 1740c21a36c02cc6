"""What conversations carry beside roles and texts: used, or refused by name, or named once with its count."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_lightning.data.chats import options
from lora_lightning.data.chats.rendering import Renderer, Tools
from lora_lightning.data.chats.turns import REASONING, Turn, json_value
from lora_lightning.data.sources.faults import RowError

log = logging.getLogger(__name__)

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
RENDERED = ("documents",)
"""Columns that other tools hand to the template, and Chat does not."""
SYSTEM = ("system", "system_prompt")
"""Columns of a system text."""
UNFINISHED = ("prefix", "partial")
"""Keys of an answer that a model is to go on with: Mistral's and DeepSeek's, Qwen's and Kimi's. It has no end yet."""
LEARNED_KEYS = (*REASONING, "tool_calls", "function_call", "refusal", *UNFINISHED, "chosen", "rejected", *MEDIA)
"""Keys of a turn whose absence changes what is learned."""
TEXT_KEYS = ("role", "content")


def refuse_columns(row: Mapping[str, Any], where: str, used: Collection[str] = ()) -> None:
    """Raise `RowError` for a row with a value in a column that would change what is learned, and is not `used`."""
    for name in (*MEDIA, *RENDERED):
        if row.get(name) and name not in used:
            owner = "MediaChat" if used else "Chat"
            reads = f"It reads {', '.join(used)}" if used else "MediaChat reads images and sounds"
            raise RowError(
                f'with a value in "{name}"',
                f'{where} has a value in the column "{name}", which {owner} does not read: it learns text, '
                f"rendered from turns and tools. {reads}. Remove the column, or rename it",
            )


def with_system(turns: list[Turn], row: Mapping[str, Any], where: str) -> list[Turn]:
    """The turns behind the system text of a column.

    Raises:
        RowError: the turns begin with a system turn, too.
    """
    text = next((row[name] for name in SYSTEM if row.get(name)), None)
    if text is None:
        return turns
    if turns[0]["role"] == "system" and turns[0]["content"] != text:
        raise RowError("with two system texts", f"{where} has a system turn and another text in its system column")
    return turns if turns[0]["role"] == "system" else [{"role": "system", "content": str(text)}, *turns]


class Fields:
    """What a template does with the keys of turns; each key is tried once where it can be told.

    Args:
        renderer: The template.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self._written: dict[str, bool] = {}
        self._marks = tuple(renderer.tokenizer.all_special_tokens)
        self.left_out: Counter[str] = Counter()
        """Turns by key that the template does not write, without consequence for what is learned."""
        self.special: Counter[str] = Counter()
        """Turns by special token of the tokenizer that their text spells, so that it is read as one."""

    def check(self, turns: Sequence[Turn], tools: Tools, where: str) -> None:
        """Try the keys of the turns.

        Raises:
            RowError: the template leaves out what should be learned: tools, their calls, reasoning, media.
        """
        if tools and not self._writes("tools", turns, tools, where):
            raise self._refusal("tools", where)
        for number, turn in enumerate(turns):
            what = f"text in turns of the role {turn['role']}"
            if turn["content"] and what not in self._written:
                self._written[what] = self.renderer.writes_content(number, turns, tools, where)
            if turn["content"] and not self._written[what]:
                raise self._refusal(what, where)
            self.special.update(mark for mark in self._marks if mark in turn["content"])
            for key in turn:
                if key in TEXT_KEYS or not turn[key]:
                    continue
                # reasoning of earlier turns is left out by design: tried where the turn is the last
                written = self._writes(key, turns[: number + 1], tools, where)
                if not written and key in LEARNED_KEYS:
                    raise self._refusal(key, where)
                if not written:
                    self.left_out[key] += 1

    def _writes(self, key: str, turns: Sequence[Turn], tools: Tools, where: str) -> bool:
        if key not in self._written:
            self._written[key] = self.renderer.writes(key, turns, tools, where)
        return self._written[key]

    def _refusal(self, key: str, where: str) -> RowError:
        if key in UNFINISHED:
            return RowError(
                f"with {key} that the template leaves out",
                f"{where} has {key}, which marks an answer without an end, to be gone on with; the chat template "
                f"{self.renderer.name} ends it, and its end would be learned. Give the whole answer in one turn, or "
                f"remove {key} from one that is whole",
            )
        return RowError(
            f"with {key} that the template leaves out",
            f"{where} has {key}, which the chat template {self.renderer.name} leaves out. Give a chat_template that "
            "writes them, or remove them from the data",
        )


class Rendering:
    """A template with the variables of each row, and what it does with the keys of turns.

    Args:
        renderer: The template with the variables of all rows.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._by_options: dict[str, Fields] = {}

    def of(self, row: Mapping[str, Any], where: str) -> Fields:
        """The template with the variables of a row.

        Raises:
            RowError: one that the template does not read.
        """
        given = json_value(row.get(options.NAME) or {}, f"{where}: {options.NAME}")
        if not isinstance(given, Mapping):
            message = f"{where}: {options.NAME} is {given!r}; it must be an object of names and values"
            raise RowError("with template variables of another shape", message)
        given = {name: value for name, value in given.items() if value is not None}
        key = json.dumps(given, sort_keys=True, default=str)
        if key not in self._by_options:
            options.check_options(self._renderer.tokenizer.get_chat_template(), given, f"{where}: {options.NAME}")
            self._by_options[key] = Fields(replace(self._renderer, options={**self._renderer.options, **given}))
        return self._by_options[key]

    def tell(self, what: str) -> None:
        """Name the keys that were left out, and special tokens that texts spell, once each with their count."""
        special = sum((fields.special for fields in self._by_options.values()), Counter[str]())
        if special:
            told = ", ".join(f"{mark} ({count} turns)" for mark, count in sorted(special.items()))
            log.warning(
                "%s: texts of turns spell special tokens and are read as them: %s. Where a template has been applied "
                "to the data already, learn them as text instead",
                what,
                told,
            )
        left_out = sum((fields.left_out for fields in self._by_options.values()), Counter[str]())
        if left_out:
            told = ", ".join(f"{key} ({count} turns)" for key, count in sorted(left_out.items()))
            log.warning("%s: the chat template %s does not write %s", what, self._renderer.name, told)
