"""Conversations: a causal language model learns the assistant's turns."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import datasets

from lora_lightning.data.batches.streaming import Encoder
from lora_lightning.data.causal_text import CausalText
from lora_lightning.data.chats import options
from lora_lightning.data.chats.fields import MEDIA, RENDERED, SYSTEM, Rendering, refuse_columns, with_system
from lora_lightning.data.chats.rendering import Example, Renderer, Tools
from lora_lightning.data.chats.templates import choose_template
from lora_lightning.data.chats.turns import (
    LEARNED,
    Turn,
    conversation,
    json_value,
    last_answer,
    learned,
    plain,
    text_content,
    tool_list,
    without_first_exchange,
)
from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.sources.stored import PLACE
from lora_lightning.data.sources.tables import UNREADABLE
from lora_lightning.data.sources.unread import COMPARED, kind_of
from lora_lightning.data.tokens.causal import NO_LOSS, completion_example
from lora_lightning.data.tokens.encoding import tokenised
from lora_lightning.errors import DataError

log = logging.getLogger(__name__)

COLUMNS = ("messages", "conversations")
"""What data sets call the column of turns."""
PAIR = ("prompt", "completion")
"""Columns of a conversation in two parts, of which the second is learned."""
NO_ANSWER, TOO_LONG = "without an assistant turn", "that max_length leaves nothing to learn in"
NOT_LEARNED = "whose assistant turns are empty or have a weight of 0"
SKIPPED = "that cannot be used"


class Chat(CausalText):
    """Conversations for a causal language model, rendered by a chat template, with the loss on assistant turns only.

    A conversation is a list of turns: role and content (roles system, developer, user, assistant, tool; tool_calls
    where a template takes them), or from and value as in ShareGPT. The token that ends an assistant's turn is learned
    too; turns behind the last learned one are left out. A turn with weight: 0, train: false or loss: false is read and
    not learned, and so is an empty one. A column "system" becomes the first turn. Columns prompt and completion, both
    of turns, are one conversation of which the completion is learned. Other keys of turns go to the template; one that
    it does not write is named, and is an error where it would change what is learned. Where a template writes an answer
    otherwise once turns follow it, as those do that drop earlier reasoning, it is learned in an example of its own.

    A conversation longer than max_length loses its first exchanges, but not its system turn, then tokens on the right.
    What keeps nothing to learn is dropped and counted.

    To predict, the last turn is answered, or answered again where it is the assistant's; its loss is told then.

    Args:
        messages: Column of the turns; null takes "messages" or "conversations".
        tools: Column of tool descriptions (a list, or its JSON text); null takes "tools" where there is one.
        chat_template: A name (chatml, llama-3, llama-3.1, qwen-2.5, qwen-3, gemma-3, mistral, phi-3, phi-4, harmony,
            deepseek-v3, deepseek-r1, zephyr, plain), a file, or a Jinja text; null takes the tokenizer's own.
        turns: Learn all assistant turns, or only the last one.
        chat_template_kwargs: Further variables of the template, such as `{enable_thinking: false}`; a column of that
            name gives those of a row.
        common: Settings that all text data share.
    """

    media_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of images and sounds that are used."""
    beside: ClassVar[dict[str, Any]] = {}
    """What an example has beside token ids and labels: its columns, and what one that is left out has in them."""

    def __init__(
        self,
        messages: str | None = None,
        tools: str | None = None,
        chat_template: str | None = None,
        turns: Literal["all", "last"] = "all",
        chat_template_kwargs: dict[str, Any] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.messages = messages
        self.tools = tools
        self.chat_template = chat_template
        self.turns = turns
        self.chat_template_kwargs = chat_template_kwargs
        self._named: set[str] = set()
        self._unlearned: Counter[str] = Counter()

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows with a column of turns."""
        there = self.sources.column_names(split)
        if there is None:
            return None
        column = self._column(there, split)
        required = {f"{self._name}.messages": column}
        if column == PAIR[0] and split != "predict" and self.messages is None:
            required[f"{self._name}.messages, behind prompt"] = PAIR[1]
        if self.tools is not None:
            required[f"{self._name}.tools"] = self.tools
        media = [name for name in self.media_columns if name in there]  # one question is asked about many images
        compared = {} if self.messages else COMPARED  # whoever names "chosen" knows the other one
        rows = self.sources.read(split, required, texts=[], hold_out_by=[column, *media], changing=compared)
        known = {*required.values(), "tools", options.NAME, *SYSTEM, *MEDIA, *RENDERED}
        other = [name for name in there if name not in known | self._named and not kind_of(name)]
        if other:
            self._named |= set(other)
            count = f" of {len(rows)} {split} rows" if isinstance(rows, datasets.Dataset) else ""
            log.warning("%s: columns%s that it does not know are not used: %s", self._name, count, ", ".join(other))
        return rows

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Token ids and loss mask of each conversation that has something to learn; `dropped` counts the others."""
        self._unlearned.clear()
        encoded = tokenised(rows, self.encoder(split))
        lost = encoded["lost"][:]
        self._count_lost(split, Counter(filter(None, lost)), len(rows), len(encoded))
        kept = encoded.remove_columns(["lost", "skipped"])
        return kept.select([number for number, reason in enumerate(lost) if not reason]) if any(lost) else kept

    def encoder(self, split: str) -> Encoder:
        """Token ids and loss mask of conversations, or in `lost` why there are none."""
        _ = self.renderer  # a template that is missing is told before any row is read

        def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            examples, column = [], self._column(list(batch), split)
            for place, number in enumerate(numbers):
                row = {name: values[place] for name, values in batch.items()}
                try:
                    made = self._of_row(row, column, split)
                except RowError as fault:
                    self.sources.fault(split, row.get(PLACE), fault)
                    made = [self._lost(SKIPPED, False)]
                examples += [{**one, "index": number, "skipped": one["lost"] == SKIPPED} for one in made]
            names = ("input_ids", "attention_mask", "labels", "index", "truncated", "lost", "skipped", *self.beside)
            return {name: [example[name] for example in examples] for name in names}

        return encode

    def readable(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its turns as a list."""
        column = self._column(list(row), "predict")
        return {**row, column: json_value(row[column], f"{self._name}.messages")}

    @cached_property
    def rendering(self) -> Rendering:
        """The template with the variables of each row."""
        return Rendering(self.renderer)

    @cached_property
    def renderer(self) -> Renderer:
        """The tokenizer with the template, which is its own from here on, so that whoever saves it saves that too."""
        template, name = choose_template(self.tokenizer_object, self.chat_template)
        if template is not None:
            self.tokenizer_object.chat_template = template
        given = self.chat_template_kwargs or {}
        options.check_options(self.tokenizer_object.get_chat_template(), given, f"{self._name}.{options.NAME}")
        return Renderer(self.tokenizer_object, name, self.turns == "last", given)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _column(self, there: list[str], split: str) -> str:
        column = self.messages or next((name for name in COLUMNS if name in there), None)
        if column is None and PAIR[0] in there and (PAIR[1] in there or split == "predict"):
            return PAIR[0]
        if column is None:
            names = ", ".join(name for name in there if name not in (PLACE, UNREADABLE))
            raise DataError(
                f"{self._name}.messages is null, and {split} has the columns {names}; name the one that holds turns."
            )
        return column

    def _of_row(self, row: Mapping[str, Any], column: str, split: str) -> list[dict[str, Any]]:
        """The examples of a row, mostly one, or why there is none; raises `RowError`."""
        where = f"{self._name}.messages"
        turns = self.turns_of(row, column)
        described = tool_list(row.get(self.tools or "tools"), f"{where}: tools")
        fields = self.rendering.of(row, where)
        fields.check(plain(turns), described, where)
        if split == "predict":
            return [self.to_predict(fields.renderer, turns, described, where)]
        return self._to_learn(fields.renderer, turns, described, where)

    def turns_of(self, row: Mapping[str, Any], column: str) -> list[Turn]:
        """The turns of a row; raises `RowError` for what is no conversation."""
        where = f"{self._name}.messages"
        refuse_columns(row, where, self.media_columns)
        turns = conversation(row[column], where, self.content)
        if self.messages is None and column == PAIR[0] and row.get(PAIR[1]) is not None:
            asked = [{**turn, LEARNED: False} if turn["role"] == "assistant" else turn for turn in turns]
            turns = [*asked, *conversation(row[PAIR[1]], f"{where}: completion", self.content)]
        return self.completed(with_system(turns, row, where), row, where)

    def _to_learn(self, renderer: Renderer, turns: list[Turn], tools: Tools, where: str) -> list[dict[str, Any]]:
        """The examples, or why there is none."""
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        kept = [learned([turn])[0] for turn in answers]
        for turn, keep in zip(answers, kept, strict=True):
            if not keep:
                self._unlearned["with a weight of 0" if turn["content"] else "that are empty"] += 1
        turns = turns[: last_answer(turns) + 1]
        if not turns:
            return [self._lost(NOT_LEARNED if answers else NO_ANSWER, True)]

        def rendered(part: list[Turn]) -> list[Example]:
            return renderer.examples(plain(part), tools, where, learned(part))

        first = rendered(turns)
        if len(first) == 1:
            return [self._within(first[0], turns, rendered)]
        parts = [_learning_only(turns, example.turns) for example in first]
        return [self._within(example, part, rendered) for example, part in zip(first, parts, strict=True)]

    def _within(
        self, example: Example, turns: list[Turn], rendered: Callable[[list[Turn]], list[Example]]
    ) -> dict[str, Any]:
        """The example within max_length, without its first exchanges where it is longer; or why there is none."""
        whole = len(example.ids)
        while (
            len(example.ids) > self.max_length
            and (shorter := without_first_exchange(turns))
            and last_answer(shorter) >= 0
        ):
            turns = shorter
            example = rendered(turns)[-1]
        return self.within(example, turns, whole)

    def content(self, given: Any, where: str) -> Any:
        """What a turn holds of its content: text; raises `RowError`."""
        return text_content(given, where)

    def completed(self, turns: list[Turn], row: Mapping[str, Any], where: str) -> list[Turn]:  # noqa: ARG002 - of media
        """The turns of a row with what other columns hold of them; raises `RowError`."""
        return turns

    def within(self, example: Example, turns: list[Turn], whole: int) -> dict[str, Any]:  # noqa: ARG002 - of media
        """What is kept of a rendered conversation, at most max_length tokens, with `lost` where nothing is learned.

        Args:
            example: The conversation, without its first exchanges where it was longer.
            turns: What it was rendered of.
            whole: Tokens with those exchanges.
        """
        ids, labels = example.ids[: self.max_length], example.labels[: self.max_length]
        found = any(label != NO_LOSS for label in labels[1:])
        return {**_example(ids, labels, len(ids) < whole), "lost": "" if found else TOO_LONG}

    def to_predict(self, renderer: Renderer, turns: list[Turn], tools: Tools, where: str) -> dict[str, Any]:
        """The prompt of the last answer, and that answer where there is one, to be told the loss of; `RowError`."""
        asked, prompt, answered = prompted(renderer, self.max_length, turns, tools, where)
        ids, labels = answered[:2] if answered else (prompt, [NO_LOSS] * len(prompt))
        learned = [number for number, label in enumerate(labels) if label != NO_LOSS] or [len(ids)]
        example = completion_example([], ids[: learned[0]], ids[learned[0] : learned[-1] + 1], self.max_length)
        shorter = len(asked) + bool(answered) < len(turns)
        return {**example, "truncated": shorter or len(ids) > self.max_length, "lost": ""}

    def _lost(self, reason: str, truncated: bool) -> dict[str, Any]:
        return {**_example([], [], truncated), **self.beside, "lost": reason}

    def _count_lost(self, split: str, lost: Counter[str], rows: int, examples: int) -> None:
        skipped = lost.pop(SKIPPED, 0)
        self.dropped[split] = lost.total()
        self.rendering.tell(f"{self._name}: {split}")
        if self._unlearned:
            told = " and ".join(f"{count} {what}" for what, count in self._unlearned.items())
            log.warning("%s: %s: assistant turns are read and not learned: %s", self._name, split, told)
        reasons = ", ".join(f"{count} {reason}" for reason, count in lost.items())
        if lost.total() + skipped == examples:
            faults = self.sources.told(split) if skipped else ""
            reasons = "; ".join(filter(None, (reasons, faults)))
            raise DataError(f"{self._name}.{split}: nothing is left of {rows} conversations: {reasons}.")
        if examples > rows:
            log.warning(
                "%s: %s: %d conversations are %d examples, as the chat template writes answers otherwise once turns "
                "follow them",
                self._name,
                split,
                rows,
                examples,
            )
        if lost:
            log.warning("%s: left %d of %d %s rows out: %s", self._name, lost.total(), examples, split, reasons)


def prompted(
    renderer: Renderer, max_length: int, turns: list[Turn], tools: Tools, where: str
) -> tuple[list[Turn], list[int], Example | None]:
    """The turns that are answered, without first exchanges that make them too long; their tokens; and the answer.

    The answer is an example of its own where the last turn is the assistant's.
    """
    turns = plain(turns)
    answer = last_answer(turns) == len(turns) - 1
    asked = turns[:-1] if answer else turns
    prompt = renderer.prompt(asked, tools, where)
    while len(prompt) >= max_length and (shorter := without_first_exchange(asked)):
        asked = shorter
        prompt = renderer.prompt(asked, tools, where)
    if not answer:
        return asked, prompt, None
    return asked, prompt, replace(renderer, last_only=True).examples([*asked, turns[-1]], tools, where)[-1]


def _learning_only(turns: list[Turn], numbers: Sequence[int]) -> list[Turn]:
    """The turns up to the last of those with the numbers, which alone are learned."""
    part = turns[: numbers[-1] + 1]
    return [turn if number in numbers else {**turn, LEARNED: False} for number, turn in enumerate(part)]


def _example(ids: list[int], labels: list[int], truncated: bool) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "truncated": truncated}
