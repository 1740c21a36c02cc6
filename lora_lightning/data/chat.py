"""Conversations: a causal language model learns the assistant's turns."""

from __future__ import annotations

import logging
from collections import Counter
from functools import cached_property
from typing import Any, Literal

import datasets

from lora_lightning.data.batches.streaming import Encoder
from lora_lightning.data.causal_text import CausalText
from lora_lightning.data.chats.rendering import Renderer, Tools
from lora_lightning.data.chats.templates import choose_template
from lora_lightning.data.chats.turns import Turn, conversation, last_answer, tool_list, without_first_exchange
from lora_lightning.data.tokens.causal import NO_LOSS, completion_example
from lora_lightning.data.tokens.encoding import tokenised
from lora_lightning.errors import DataError

log = logging.getLogger(__name__)

COLUMNS = ("messages", "conversations")
"""What data sets call the column of turns."""
NO_ANSWER, TOO_LONG = "without an assistant turn", "that max_length leaves nothing to learn in"


class Chat(CausalText):
    """Conversations for a causal language model, rendered by a chat template, with the loss on assistant turns only.

    A conversation is a list of turns: role and content (roles system, developer, user, assistant, tool; tool_calls
    where a template takes them), or from and value as in ShareGPT. The token that ends an assistant's turn is learned
    too; turns behind the last of them are left out. A conversation longer than max_length loses its first exchanges,
    but not its system turn, then tokens on the right. What keeps nothing to learn is dropped and counted.

    To predict, the last turn is answered, or answered again where it is the assistant's; its loss is told then.

    Args:
        messages: Column of the turns; null takes "messages" or "conversations".
        tools: Column of tool descriptions (a list, or its JSON text); null takes "tools" where there is one.
        chat_template: chatml, llama-3, zephyr or plain, a file, or a Jinja text; null takes the tokenizer's own.
        turns: Learn all assistant turns, or only the last one, which is right for templates that rewrite earlier turns.
        common: Settings that all text data share.
    """

    def __init__(
        self,
        messages: str | None = None,
        tools: str | None = None,
        chat_template: str | None = None,
        turns: Literal["all", "last"] = "all",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.messages = messages
        self.tools = tools
        self.chat_template = chat_template
        self.turns = turns
        self._seen: set[str] = set()

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows with a column of turns."""
        there = self.sources.column_names(split)
        if there is None:
            return None
        required = {"Chat.messages": self._column(there, split)}
        if self.tools is not None:
            required["Chat.tools"] = self.tools
        return self.sources.read(split, required, texts=[], hold_out_by=[required["Chat.messages"]])

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Token ids and loss mask of each conversation that has something to learn; `dropped` counts the others."""
        encoded = tokenised(rows, self.encoder(split))
        lost = encoded["lost"][:]
        self._count_lost(split, Counter(filter(None, lost)), len(rows))
        kept = encoded.remove_columns("lost")
        return kept.select([number for number, reason in enumerate(lost) if not reason]) if any(lost) else kept

    def encoder(self, split: str) -> Encoder:
        """Token ids and loss mask of conversations, or in `lost` why there are none."""
        tools = self.tools or "tools"
        _ = self.renderer  # a template that is missing is told before any row is read

        def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            examples, column = [], self._column(list(batch), split)
            given_tools = batch.get(tools, [None] * len(numbers))
            for number, value, given in zip(numbers, batch[column], given_tools, strict=True):
                where = f"Chat.{split}, row {number}"
                turns = conversation(value, where)
                described = tool_list(given, f"{where}: tools")
                self._check_rendered(turns, described, where)
                make = self._to_predict if split == "predict" else self._to_learn
                examples.append({**make(turns, described, where), "index": number})
            names = ("input_ids", "attention_mask", "labels", "index", "truncated", "lost")
            return {name: [example[name] for example in examples] for name in names}

        return encode

    @cached_property
    def renderer(self) -> Renderer:
        """The tokenizer with the template, which is its own from here on, so that whoever saves it saves that too."""
        template, name = choose_template(self.tokenizer_object, self.chat_template)
        if template is not None:
            self.tokenizer_object.chat_template = template
        return Renderer(self.tokenizer_object, name, self.turns == "last")

    def _column(self, there: list[str], split: str) -> str:
        column = self.messages or next((name for name in COLUMNS if name in there), None)
        if column is None:
            raise DataError(
                f"Chat.messages is null, and {split} has the columns {', '.join(there)}; name the one that holds turns."
            )
        return column

    def _check_rendered(self, turns: list[Turn], tools: Tools, where: str) -> None:
        """Once for tools and once for their calls: a template may know neither."""
        kinds = {"tools"} if tools else set()
        kinds |= {"tool_calls"} if any(turn.get("tool_calls") for turn in turns) else set()
        renderer = self.renderer
        if kinds <= self._seen:
            return
        self._seen |= kinds
        if ignored := renderer.ignored(turns, tools, where):
            raise DataError(
                f"{where} has {ignored}, which the chat template {renderer.name} leaves out. Give a chat_template that "
                "writes them, or remove them from the data."
            )

    def _to_learn(self, turns: list[Turn], tools: Tools, where: str) -> dict[str, Any]:
        """One example, or why there is none."""
        turns = turns[: last_answer(turns) + 1]
        if not turns:
            return {**_example([], [], True), "lost": NO_ANSWER}
        ids, labels = self.renderer.example(turns, tools, where)
        whole = len(ids)
        while len(ids) > self.max_length and (shorter := without_first_exchange(turns)) and last_answer(shorter) >= 0:
            turns = shorter
            ids, labels = self.renderer.example(turns, tools, where)
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        learned = any(label != NO_LOSS for label in labels[1:])
        return {**_example(ids, labels, len(ids) < whole), "lost": "" if learned else TOO_LONG}

    def _to_predict(self, turns: list[Turn], tools: Tools, where: str) -> dict[str, Any]:
        """The prompt of the last answer, and that answer where there is one."""
        answer = last_answer(turns) == len(turns) - 1
        asked = turns[:-1] if answer else turns
        prompt = self.renderer.prompt(asked, tools, where)
        while len(prompt) >= self.max_length and (shorter := without_first_exchange(asked)):
            asked = shorter
            prompt = self.renderer.prompt(asked, tools, where)
        last = Renderer(self.tokenizer_object, self.renderer.name, last_only=True)
        ids, labels = last.example([*asked, turns[-1]], tools, where) if answer else (prompt, [NO_LOSS] * len(prompt))
        learned = [number for number, label in enumerate(labels) if label != NO_LOSS] or [len(ids)]
        example = completion_example([], ids[: learned[0]], ids[learned[0] : learned[-1] + 1], self.max_length)
        return {**example, "truncated": len(asked) + answer < len(turns) or len(ids) > self.max_length, "lost": ""}

    def _count_lost(self, split: str, lost: Counter[str], rows: int) -> None:
        self.dropped[split] = lost.total()
        reasons = ", ".join(f"{count} {reason}" for reason, count in lost.items())
        if lost.total() == rows:
            raise DataError(f"Chat.{split}: nothing is left of {rows} conversations: {reasons}.")
        if lost:
            log.warning("Chat: left %d of %d %s rows out: %s", lost.total(), rows, split, reasons)


def _example(ids: list[int], labels: list[int], truncated: bool) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "truncated": truncated}
