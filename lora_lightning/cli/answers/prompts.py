"""Prompts of a file: rows as people have them, to the tokens that an adapter was trained to go on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.cli.answers.run_data import TEXTS_ALONE
from lora_lightning.cli.answers.voices import Voice, plain_prompt
from lora_lightning.data.chats.fields import with_system
from lora_lightning.data.chats.rendering import Renderer
from lora_lightning.data.chats.turns import conversation, json_value, last_answer, plain, tool_list
from lora_lightning.data.media.parts import COLUMNS, KINDS
from lora_lightning.data.sources.stored import PLACE
from lora_lightning.data.sources.tables import UNREADABLE, read_table
from lora_lightning.data.sources.texts import as_text
from lora_lightning.errors import DataError, did_you_mean

TURNS = ("messages", "conversations")
"""Columns of conversations."""
TEXTS = ("prompt", "text", "question", "instruction", "source")
"""Columns of texts, the first of them that is there."""


def read_rows(source: str) -> list[dict[str, Any]]:
    """The rows of a file, folder, table or hub data set.

    Raises:
        DataError: it cannot be read, naming the line.
    """
    table = read_table(source, "test", field="--input")
    return [{k: v for k, v in row.items() if k not in (PLACE, UNREADABLE)} for row in table]


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

    def ids(self, row: Mapping[str, Any], where: str, room: int | None) -> list[int]:
        """Token ids of a row's prompt; a plain text that is longer than `room` loses its first tokens.

        Raises:
            DataError: the row has no prompt, or the chat template refuses it, or its turns are too long, or it has
                images or sounds.
        """
        if held := next((name for name in COLUMNS if row.get(name) is not None), None):
            raise DataError(f'{where} has a value in the column "{held}"; {TEXTS_ALONE}.')
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
        if held := next((kind for kind in KINDS if isinstance(turns, list) and f"'type': '{kind}" in str(turns)), None):
            raise DataError(f"{where} has a part of type {held}; {TEXTS_ALONE}.")
        asked = turns if isinstance(turns, list) else [{"role": "user", "content": text}]
        said = with_system(conversation(asked, where), row, where)
        if self.system and said[0]["role"] != "system":
            said = [{"role": "system", "content": self.system}, *said]
        said = plain(said[:-1] if last_answer(said) == len(said) - 1 else said)
        tools = tool_list(row.get("tools"), f"{where}: tools")
        ids = Renderer(self.voice.tokenizer, f"of {self.voice.label}").prompt(said, tools, where)
        if room is not None and len(ids) > room:
            raise DataError(f"{where} has {len(ids)} tokens; the model has room for {room} beside the answer.")
        return ids

    def _plain(self, text: str, where: str, room: int | None) -> list[int]:
        ids = plain_prompt(self.voice.tokenizer, text, self.seq2seq)
        if not ids or not text.strip():
            raise DataError(f"{where} is empty, so there is nothing to go on from.")
        start = len(plain_prompt(self.voice.tokenizer, "", self.seq2seq)) if not self.seq2seq else 0
        return ids if room is None or len(ids) <= room else [*ids[:start], *ids[len(ids) - room + start :]]

    def _column(self, row: Mapping[str, Any]) -> str:
        if self.column is not None:
            if self.column not in row:
                near = did_you_mean(self.column, row)
                raise DataError(f'--column is "{self.column}".{near} Columns: {", ".join(row)}.')
            return self.column
        found = next((name for name in (*self.voice.data.columns, *TURNS, *TEXTS) if name in row), None)
        if found is None and len(row) == 1:
            found = next(iter(row))
        if found is None:
            raise DataError(f"--column is not given, and the rows have {', '.join(row)}; name the one of the prompts.")
        return str(found)


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of prompts in batches of similar length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    return [order[start : start + size] for start in range(0, len(order), size)]
