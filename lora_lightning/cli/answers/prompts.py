"""Prompts of a file: rows as people have them, to the tokens that an adapter was trained to go on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_lightning.cli.answers.asking import content_of, prompt_of, reads_none
from lora_lightning.cli.answers.voices import Voice, plain_prompt
from lora_lightning.data.chats.fields import Rendering, with_system
from lora_lightning.data.chats.turns import Turn, conversation, json_value, last_answer, plain, tool_list
from lora_lightning.data.media.parts import COLUMNS, column_with_media, marked, with_media
from lora_lightning.data.media.prompts import Prompt
from lora_lightning.data.sources.faults import Faults
from lora_lightning.data.sources.splits import undecoded_table
from lora_lightning.data.sources.stored import PLACE
from lora_lightning.data.sources.tables import UNREADABLE, read_table
from lora_lightning.data.sources.texts import as_text
from lora_lightning.errors import DataError, did_you_mean

TURNS = ("messages", "conversations")
"""Columns of conversations."""
TEXTS = ("prompt", "text", "question", "instruction", "source")
"""Columns of texts, the first of them that is there."""


@dataclass(frozen=True)
class Row:
    """A row of prompts."""

    values: dict[str, Any]
    """By column; images and sounds of `datasets` as bytes and path."""
    folder: Path | None = None
    """What paths of images and sounds are relative to; None for the directory of the command."""


def read_rows(source: str) -> list[Row]:
    """The rows of a file, folder, table or hub data set.

    Raises:
        DataError: it cannot be read, naming the line.
    """
    faults = Faults()
    table = undecoded_table(read_table(source, "test", field="--input", faults=faults))
    return [
        Row(
            {k: v for k, v in row.items() if k not in (PLACE, UNREADABLE)},
            None if row.get(PLACE) is None else faults.places.folder(int(row[PLACE])),
        )
        for row in table
    ]


class Prompter:
    """Makes prompts for one voice, as the data of its run were made where it has any.

    Args:
        voice: who answers.
        column: column of the prompts; None looks for a usual one.
        system: system text of conversations that have none.
        as_plain: go on with texts as they are, though there is a chat template or a prompt format.
        seq2seq: whether the model reads a text whole.
    """

    def __init__(
        self, voice: Voice, column: str | None, system: str, as_plain: bool = False, seq2seq: bool = False
    ) -> None:
        self.voice, self.column, self.system, self.seq2seq, self.as_plain = voice, column, system, seq2seq, as_plain
        self.in_turns = voice.in_turns and not as_plain
        self.layout = None if as_plain else voice.data.layout
        self._rendering = Rendering(voice.renderer)

    def prompt(self, row: Mapping[str, Any], where: str, room: int | None, folder: Path | None = None) -> Prompt:
        """A row's prompt; a plain text that is longer than `room` loses its first tokens.

        Args:
            row: values by column.
            where: what to call it in messages.
            room: most tokens; None where nothing bounds it.
            folder: what paths of images and sounds are relative to.

        Raises:
            DataError: the row has no prompt, or the chat template refuses it, or its turns are too long, or it has
                images or sounds that cannot be read.
        """
        held = column_with_media(row)
        if held and (self.voice.processor is None or not self.in_turns):
            given = f'{where} has a value in the column "{held}"'
            plain_text = replace(self.voice, without="--plain writes no turns.") if self.as_plain else self.voice
            raise reads_none(plain_text, given)
        if self.column is None and self.layout is not None and all(name in row for name in self.layout.required):
            return self._plain(self.layout.fill(row), where, room)
        value = row[self._column(row)]
        text = as_text(value) or ""
        turns = json_value(value, where) if isinstance(value, list) or text.lstrip().startswith("[{") else None
        if isinstance(turns, list) and not self.voice.tokenizer.chat_template:
            raise DataError(f"{where} holds turns; {self.voice.label} has no chat template that would write them.")
        if not isinstance(turns, list) and not self.in_turns:
            if text.strip() and not self.as_plain:
                text = self.voice.data.asked(text, where)
            return self._plain(text, where, room)
        tools = tool_list(row.get(self.voice.data.tools), f"{where}: tools")
        by = self._rendering.of(row, where).renderer
        found = prompt_of(self.voice, self._turns(turns, text, row, where, folder), where, tools, by)
        if room is not None and len(found.ids) > room:
            raise DataError(f"{where} has {len(found.ids)} tokens; the model has room for {room} beside the answer.")
        return found

    def _turns(self, given: Any, text: str, row: Mapping[str, Any], where: str, folder: Path | None) -> list[Turn]:
        """The turns of a row, or the one that asks its text, with images and sounds, up to what is answered."""
        reads = self.voice.processor is not None
        asked = (
            given if isinstance(given, list) else [{"role": "user", "content": marked(text, row) if reads else text}]
        )
        said = conversation(asked, where, lambda content, what: content_of(self.voice, content, what))
        said = with_system(said, row, where)
        if self.system and said[0]["role"] != "system":
            said = [{"role": "system", "content": self.system}, *said]
        said = with_media(said, row, folder, where) if reads else said
        return plain(said[:-1] if last_answer(said) == len(said) - 1 else said)

    def _plain(self, text: str, where: str, room: int | None) -> Prompt:
        ids = plain_prompt(self.voice.tokenizer, text, self.seq2seq)
        if not ids or not text.strip():
            raise DataError(f"{where} is empty, so there is nothing to go on from.")
        start = len(plain_prompt(self.voice.tokenizer, "", self.seq2seq)) if not self.seq2seq else 0
        fits = room is None or len(ids) <= room
        return Prompt(ids if fits or room is None else [*ids[:start], *ids[len(ids) - room + start :]])

    def _column(self, row: Mapping[str, Any]) -> str:
        if self.column is not None:
            if self.column not in row:
                near = did_you_mean(self.column, row)
                raise DataError(f'--column is "{self.column}".{near} Columns: {", ".join(row)}.')
            return self.column
        found = next((name for name in (*self.voice.data.columns, *TURNS, *TEXTS) if name in row), None)
        others = [name for name in row if name not in COLUMNS]
        if found is None and len(others) == 1:
            found = others[0]
        if found is None:
            raise DataError(f"--column is not given, and the rows have {', '.join(row)}; name the one of the prompts.")
        return str(found)


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of prompts in batches of similar length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    return [order[start : start + size] for start in range(0, len(order), size)]
