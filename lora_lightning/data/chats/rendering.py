"""Conversations to token ids and the loss mask of assistant turns, through a chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lora_lightning.data.chats.turns import Turn
from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.tokens.causal import NO_LOSS

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template says where an assistant's text begins."""
PROBE = "xProbe7Zq"
"""A text that stands in no template, and that none escapes."""
Tools = list[dict[str, Any]] | None
Span = tuple[int, int]
"""The first one, and the one behind the last."""
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

    def example(
        self, turns: Sequence[Turn], tools: Tools, where: str, learned: Sequence[bool] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids, and labels on assistant turns with the tokens that end them.

        Args:
            turns: The conversation; its last turn is the assistant's.
            tools: Tool descriptions.
            where: What to call the conversation in messages.
            learned: Whether each turn is learned if it is the assistant's; None for all.

        Raises:
            DataError: the template refuses the turns, does not mark one of them, or writes one otherwise once others
                follow it.
        """
        wanted = [n for n, turn in enumerate(turns) if turn["role"] == "assistant" and (learned is None or learned[n])]
        wanted = wanted[-1:] if self.last_only else wanted
        if not self.tokenizer.is_fast:
            ids, spans = self._by_ids(turns, tools, where, wanted)
        elif MARKS.search(self.tokenizer.get_chat_template(None, tools)):
            ids, spans = self._by_marks(turns, tools, where, wanted)
        else:
            ids, spans = self._by_texts(turns, tools, where, wanted)
        labels = [NO_LOSS] * len(ids)
        for first, end in spans:
            labels[first:end] = ids[first:end]
        return ids, labels

    def writes(self, key: str, turns: Sequence[Turn], tools: Tools, where: str) -> bool:
        """Whether the template writes what turns hold under `key`, or, for "tools", the tools."""
        text = self._text(turns, tools, where)
        if key == "tools":
            return text != self._text(turns, None, where)
        without = [{name: value for name, value in turn.items() if name != key} for turn in turns]
        return text != self._text(without, tools, where)

    def writes_content(self, turns: Sequence[Turn], tools: Tools, where: str) -> bool:
        """Whether the template writes the text of the last turn."""
        return PROBE in self._text([*turns[:-1], {**turns[-1], "content": PROBE}], tools, where)

    def _text(self, turns: Sequence[Turn], tools: Tools, where: str, prompt: bool = False) -> str:
        return str(
            _rendered(
                lambda: self.tokenizer.apply_chat_template(
                    list(turns), tools=tools, tokenize=False, add_generation_prompt=prompt
                ),
                self.name,
                where,
            )
        )

    def _marked(self, turns: Sequence[Turn], tools: Tools, where: str) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the spans of characters in it that the template marks."""
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
        return texts[0], [(start, end) for start, end in marks[0] if start < end]

    def _by_marks(
        self, turns: Sequence[Turn], tools: Tools, where: str, wanted: Sequence[int]
    ) -> tuple[list[int], list[Span]]:
        """Spans that the template marks.

        `return_assistant_tokens_mask` of transformers marks the rest of a text whose marked end is a blank that belongs
        to no token; the overlap with offsets does not. Where marks stop short of the token that ends a turn, it is
        learned too. That is the one behind the last turn, with which the text ends.
        """
        text, marks = self._marked(turns, tools, where)
        ids, offsets = self._tokens(text)
        spans = [_overlap(offsets, start, end) for start, end in marks]
        owners = self._owners(turns, tools, where, len(marks))
        if unmarked := sorted(set(wanted) - set(owners)):
            raise RowError(
                "with a turn that the template does not mark",
                f"{where}, turn {unmarked[0]}: the chat template {self.name} marks other turns with {{% generation %}} "
                "and not this one, so that it would not be learned. Give another chat_template, or the turn weight: 0.",
            )
        last = spans[-1][1] if spans else len(ids)
        end = ids[last] if last < len(ids) and ids[last] in self._special() else None
        found = zip(owners, spans, strict=True)
        return ids, [(first, self._with_end(ids, first, stop, end)) for turn, (first, stop) in found if turn in wanted]

    def _owners(self, turns: Sequence[Turn], tools: Tools, where: str, marks: int) -> list[int]:
        """The turn that each marked span belongs to: a template may mark none of a turn, or several spans."""
        answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        if marks == len(answers):
            return answers
        owners: list[int] = []
        for number in answers:
            until = len(self._marked(turns[: number + 1], tools, where)[1])
            owners += [number] * (until - len(owners))
        return owners[:marks] + answers[-1:] * (marks - len(owners))

    def _with_end(self, ids: Sequence[int], first: int, stop: int, end: int | None) -> int:
        """`stop`, or behind the token that ends a turn, where it follows and the span does not hold it."""
        behind = [token for token in ids[first:stop] if self.tokenizer.decode([token]).strip()][-1:]
        held = bool(behind) and behind[0] in self._special()
        return stop + 1 if end is not None and stop < len(ids) and ids[stop] == end and not held else stop

    def _by_texts(
        self, turns: Sequence[Turn], tools: Tools, where: str, wanted: Sequence[int]
    ) -> tuple[list[int], list[Span]]:
        """Spans between the text before a turn and the text with it."""
        text = self._text(turns, tools, where)
        ids, offsets = self._tokens(text)
        spans = []
        for number in wanted:
            before = self._text(turns[:number], tools, where, prompt=True) if number else ""
            through = self._text(turns[: number + 1], tools, where)
            if not (text.startswith(before) and text.startswith(through)):
                raise self._rewritten(number, where)
            start = len(before)
            if not number or before == self._text(turns[:number], tools, where):  # it knows no generation prompt
                start = self._start_of(turns[: number + 1], tools, start, where)
            first, end = _overlap(offsets, start, len(through))
            spans.append((first, self._trimmed(ids, first, end)))
        return ids, spans

    def _start_of(self, turns: Sequence[Turn], tools: Tools, before: int, where: str) -> int:
        """Where the last turn's text begins behind its opening: where another text in its place begins."""
        found = self._text([*turns[:-1], {**turns[-1], "content": PROBE}], tools, where).find(PROBE, before)
        if found < 0:
            raise RowError(
                "whose answer cannot be told from its opening",
                f"{where}: the chat template {self.name} writes nothing for add_generation_prompt, so that the opening "
                "of an answer would be learned. Give a chat_template that does, or that marks turns with "
                "{% generation %}",
            )
        return found

    def _by_ids(
        self, turns: Sequence[Turn], tools: Tools, where: str, wanted: Sequence[int]
    ) -> tuple[list[int], list[Span]]:
        """The same by token ids, for tokenizers that do not tell which characters a token has."""
        ids, spans = self._ids(turns, tools, where), []
        for number in wanted:
            before = self.prompt(turns[:number], tools, where) if number else []
            through = self._ids(turns[: number + 1], tools, where)
            if ids[: len(before)] != before or ids[: len(through)] != through:
                raise self._rewritten(number, where)
            spans.append((len(before), self._trimmed(ids, len(before), len(through))))
        return ids, spans

    def _rewritten(self, number: int, where: str) -> RowError:
        return RowError(
            "with a turn that the template rewrites",
            f"{where}, turn {number}: the chat template {self.name} writes this turn otherwise once others "
            "follow it, so that the model would learn what it never sees. Set Chat.turns to last, or give a "
            "chat_template that marks assistant turns with {% generation %}",
        )

    def _tokens(self, text: str) -> tuple[list[int], list[Span]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]

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
        message = f"{where}: the chat template {name} cannot render it: {reason}"
        raise RowError("that the template cannot render", message) from error
