"""Conversations to token ids and the loss mask of assistant turns, through a chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lora_lightning.data.chats.turns import Turn
from lora_lightning.data.tokens.causal import NO_LOSS
from lora_lightning.errors import DataError

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template says where an assistant's text begins."""
Tools = list[dict[str, Any]] | None
Result = TypeVar("Result")


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with a chat template.

    The template writes start and end tokens; none are added.

    Args:
        tokenizer: The tokenizer, which renders its `chat_template`.
        name: What to call the template in messages.
        last_only: Whether only the last assistant turn is learned.
    """

    tokenizer: Any
    name: str
    last_only: bool = False

    def prompt(self, turns: Sequence[Turn], tools: Tools, where: str) -> list[int]:
        """Tokens up to where the assistant's next turn begins."""
        ids: list[int] = _rendered(
            lambda: self.tokenizer.apply_chat_template(
                list(turns), tools=tools, add_generation_prompt=True, return_dict=False
            ),
            self.name,
            where,
        )
        return ids

    def example(self, turns: Sequence[Turn], tools: Tools, where: str) -> tuple[list[int], list[int]]:
        """Token ids, and labels on assistant turns with the tokens that end them.

        Raises:
            DataError: the template refuses the turns, or one of its turns depends on later ones.
        """
        marked = MARKS.search(self.tokenizer.get_chat_template(None, tools)) and self.tokenizer.is_fast
        ids, spans = (self._by_marks if marked else self._by_prefixes)(turns, tools, where)
        labels = [NO_LOSS] * len(ids)
        for first, end in spans[-1:] if self.last_only else spans:
            labels[first:end] = ids[first:end]
        return ids, labels

    def ignored(self, turns: Sequence[Turn], tools: Tools, where: str) -> str:
        """What the template leaves out without a word: "tools", "tool_calls" or nothing."""
        text = self._text(turns, tools, where)
        if tools and text == self._text(turns, None, where):
            return "tools"
        without = [{key: value for key, value in turn.items() if key != "tool_calls"} for turn in turns]
        return "tool_calls" if without != list(turns) and text == self._text(without, tools, where) else ""

    def _text(self, turns: Sequence[Turn], tools: Tools, where: str) -> str:
        return str(
            _rendered(
                lambda: self.tokenizer.apply_chat_template(list(turns), tools=tools, tokenize=False), self.name, where
            )
        )

    def _by_marks(self, turns: Sequence[Turn], tools: Tools, where: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Spans that the template marks.

        `return_assistant_tokens_mask` of transformers marks the rest of a text whose marked end is a blank that belongs
        to no token; the overlap with offsets does not.
        """
        texts, marks = _rendered(
            lambda: render_jinja_template(
                [list(turns)],
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(None, tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            ),
            self.name,
            where,
        )
        encoded = self.tokenizer(texts[0], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        spans = [_overlap(offsets, start, end) for start, end in marks[0]]
        return ids, [(first, self._with_end(ids, end)) for first, end in spans if first < end]

    def _with_end(self, ids: Sequence[int], end: int) -> int:
        """`end`, or behind the end-of-turn token where the marks stop short of it."""
        special = self._special()
        return end + 1 if end < len(ids) and ids[end] in special and ids[end - 1] not in special else end

    def _by_prefixes(self, turns: Sequence[Turn], tools: Tools, where: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Spans between what is rendered before a turn and what is rendered with it."""
        ids, spans = self._ids(turns, tools, where), []
        answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        for number in answers[-1:] if self.last_only else answers:
            before = self.prompt(turns[:number], tools, where) if number else []
            through = self._ids(turns[: number + 1], tools, where)
            if ids[: len(before)] != before or ids[: len(through)] != through:
                raise DataError(
                    f"{where}, turn {number}: the chat template {self.name} writes this turn otherwise once others "
                    "follow it, so that the model would learn what it never sees. Set Chat.turns to last, or give a "
                    "chat_template that marks assistant turns with {% generation %}."
                )
            spans.append((len(before), self._trimmed(ids, len(before), len(through))))
        return ids, spans

    def _ids(self, turns: Sequence[Turn], tools: Tools, where: str) -> list[int]:
        ids: list[int] = _rendered(
            lambda: self.tokenizer.apply_chat_template(list(turns), tools=tools, return_dict=False), self.name, where
        )
        return ids

    def _trimmed(self, ids: Sequence[int], first: int, end: int) -> int:
        """`end` without blanks behind an end-of-turn token: they belong to the template."""
        special, last = self._special(), end
        while last > first and ids[last - 1] not in special and not self.tokenizer.decode([ids[last - 1]]).strip():
            last -= 1
        return last if last > first and ids[last - 1] in special else end

    def _special(self) -> set[int]:
        return {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}


def _overlap(offsets: Iterable[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """First token, and the one behind the last, that share a character with [start, end)."""
    inside = [number for number, (first, last) in enumerate(offsets) if first < end and last > start and last > first]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _rendered(render: Callable[[], Result], name: str, where: str) -> Result:
    try:
        return render()
    except (TemplateError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{where}: the chat template {name} cannot render it: {reason}") from error
