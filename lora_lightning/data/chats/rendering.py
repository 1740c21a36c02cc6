"""Conversations to token ids and the loss mask of assistant turns, through a chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lora_lightning.data.chats.turns import Turn, with_longer_texts, with_text
from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.tokens.causal import NO_LOSS

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template says where an assistant's text begins."""
TAGS = re.compile(r"</?\w+>")
"""What templates look for in texts, such as </think>."""
PROBE = "xProbe7Zq"
"""A text that stands in no template, and that none escapes."""
Tools = list[dict[str, Any]] | None
Span = tuple[int, int]
"""The first one, and the one behind the last."""
Spans = dict[int, list[Span]]
"""Of tokens, by the number of the turn whose they are."""
Result = TypeVar("Result")


class Encoded(NamedTuple):
    """A rendered text as token ids."""

    ids: list[int]
    offsets: Sequence[Span] = ()
    """The characters of the rendered text that each token stands for, where the tokenizer tells."""
    fixed: frozenset[int] = frozenset()
    """Tokens that stand for an image or a sound, and are never learned."""
    text: str = ""
    """The rendered text, where whoever encodes it keeps it."""


class Example(NamedTuple):
    """A rendered conversation, or its part up to a turn."""

    ids: list[int]
    labels: list[int]
    """The ids that are learned; `NO_LOSS` elsewhere."""
    turns: list[int]
    """Numbers of the turns that are learned here."""
    encoded: Encoded = Encoded([])
    """What the ids are of."""


@dataclass(frozen=True)
class Renderer:
    """A tokenizer with a chat template.

    The template writes start and end tokens; none are added.

    Args:
        tokenizer: The tokenizer, which renders its `chat_template`.
        name: What to call the template in messages.
        last_only: Whether only the last assistant turn is learned.
        options: Further variables of the template, such as enable_thinking.
        encode: What makes token ids of a rendered text and its turns; None takes the tokenizer.
    """

    tokenizer: Any
    name: str
    last_only: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    encode: Callable[[str, Sequence[Turn]], Encoded] | None = None
    _layouts: dict[Any, tuple[list[int], frozenset[int]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def prompt(self, turns: Sequence[Turn], tools: Tools, where: str) -> list[int]:
        """Tokens up to where the assistant's next turn begins."""
        if self.encode is not None:
            return self.encode(self.text(turns, tools, where, prompt=True), turns).ids
        ids: list[int] = _rendered(
            lambda: self.tokenizer.apply_chat_template(
                list(turns), tools=tools, add_generation_prompt=True, return_dict=False, **self.options
            ),
            self.name,
            where,
        )
        return ids

    def examples(
        self, turns: Sequence[Turn], tools: Tools, where: str, learned: Sequence[bool] | None = None
    ) -> list[Example]:
        """Token ids, and labels on assistant turns with the tokens that end them.

        A template may write a turn otherwise once others follow it, as those do that leave out earlier reasoning. Such
        a turn is learned as the model will write it, in an example of its own that ends with it. Most conversations are
        one example.

        Args:
            turns: The conversation; its last turn is the assistant's.
            tools: Tool descriptions.
            where: What to call the conversation in messages.
            learned: Whether each turn is learned if it is the assistant's; None for all.

        Raises:
            RowError: the template refuses the turns, does not mark one of them, or writes an answer otherwise than
                its own prompt begins it.
        """
        wanted = [n for n, turn in enumerate(turns) if turn["role"] == "assistant" and (learned is None or learned[n])]
        wanted = wanted[-1:] if self.last_only else wanted
        if not self.tokenizer.is_fast:
            by = self._by_ids
        elif MARKS.search(self.tokenizer.get_chat_template(None, tools)):
            by = self._by_marks
        else:
            by = self._by_texts
        found: list[Example] = []
        while True:
            encoded, spans = by(turns, tools, where, wanted)
            ids = encoded.ids
            labels = [NO_LOSS] * len(ids)
            for first, end in (span for of_turn in spans.values() for span in of_turn):
                labels[first:end] = ids[first:end]
            for place in encoded.fixed:
                labels[place] = NO_LOSS
            if spans or not wanted:
                found.append(Example(ids, labels, list(spans), encoded))
            wanted = [number for number in wanted if number not in spans]
            if not wanted:
                return found[::-1]
            if len(turns) == wanted[-1] + 1:  # nothing follows it
                raise self._unlike_its_prompt(wanted[-1], where)
            turns = turns[: wanted[-1] + 1]

    def writes(self, key: str, turns: Sequence[Turn], tools: Tools, where: str) -> bool:
        """Whether the template writes what turns hold under `key`, or, for "tools", the tools."""
        text = self.text(turns, tools, where)
        if key == "tools":
            return text != self.text(turns, None, where)
        without = [{name: value for name, value in turn.items() if name != key} for turn in turns]
        return text != self.text(without, tools, where)

    def writes_content(self, number: int, turns: Sequence[Turn], tools: Tools, where: str) -> bool:
        """Whether the template writes the text of a turn, which may be once others follow it."""
        other = [*turns[:number], with_text(turns[number], PROBE), *turns[number + 1 :]]
        return PROBE in self.text(other[: number + 1], tools, where) or PROBE in self.text(other, tools, where)

    def text(self, turns: Sequence[Turn], tools: Tools, where: str, prompt: bool = False) -> str:
        """What the template writes, with `prompt` up to where the assistant's next turn begins."""
        return str(
            _rendered(
                lambda: self.tokenizer.apply_chat_template(
                    list(turns), tools=tools, tokenize=False, add_generation_prompt=prompt, **self.options
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
                **{**self.tokenizer.special_tokens_map, **self.options},
            ),
            self.name,
            where,
        )
        return texts[0], [(start, end) for start, end in marks[0] if start < end]

    def _by_marks(
        self, turns: Sequence[Turn], tools: Tools, where: str, wanted: Sequence[int]
    ) -> tuple[Encoded, Spans]:
        """Spans that the template marks, of turns that it writes as it does where they are the last.

        `return_assistant_tokens_mask` of transformers marks the rest of a text whose marked end is a blank that belongs
        to no token; the overlap with offsets does not. Where marks stop short of the token that ends a turn, it is
        learned too. That is the one behind the last turn, with which the text ends.
        """
        text, marks = self._marked(turns, tools, where)
        encoded = self.encoded(text, turns)
        ids, offsets = encoded.ids, encoded.offsets
        spans = [_overlap(offsets, start, end) for start, end in marks]
        owners, unlike = self._layout(turns, tools, where, [text[slice(*mark)] for mark in marks])
        if unmarked := sorted(set(wanted) - set(owners)):
            raise RowError(
                "with a turn that the template does not mark",
                f"{where}, turn {unmarked[0]}: the chat template {self.name} marks other turns with {{% generation %}} "
                "and not this one, so that it would not be learned. Give another chat_template, or the turn weight: 0.",
            )
        last = spans[-1][1] if spans else len(ids)
        end = ids[last] if last < len(ids) and ids[last] in self._special() else None
        found: Spans = {}
        for turn, (first, stop) in zip(owners, spans, strict=True):
            if turn in wanted and turn not in unlike:
                found.setdefault(turn, []).append((first, self._with_end(ids, first, stop, end)))
        return encoded, found

    def _layout(
        self, turns: Sequence[Turn], tools: Tools, where: str, marked: list[str]
    ) -> tuple[list[int], frozenset[int]]:
        """The turn that each marked text belongs to, and the turns that are marked otherwise where no turn follows.

        Found out once for conversations of one shape: roles, keys, and tags in texts.
        """
        shape = (bool(tools), len(marked), *map(_shape, turns))
        if shape not in self._layouts:
            owners = self._owners(turns, tools, where, marked)
            unlike = set()
            for number in set(owners) - {len(turns) - 1}:
                part = turns[: number + 1]
                texts = self._marked_texts(part, tools, where)
                alone = zip(texts, self._owners(part, tools, where, texts), strict=True)
                here = [one for one, owner in zip(marked, owners, strict=True) if owner == number]
                if [one for one, owner in alone if owner == number] != here:
                    unlike.add(number)
            self._layouts[shape] = owners, frozenset(unlike)
        return self._layouts[shape]

    def _owners(self, turns: Sequence[Turn], tools: Tools, where: str, marked: list[str]) -> list[int]:
        """The turn that each marked text belongs to: the one with which it changes, else the one that comes next."""
        answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        if len(answers) < 2:
            return answers * len(marked)
        owners: list[int] = []
        for number in answers:
            changed = self._marked_texts([*turns[:number], _changed(turns[number]), *turns[number + 1 :]], tools, where)
            back = _common(marked[::-1], changed[::-1])
            if _common(marked, changed) < len(marked):
                owners += [number] * (len(marked) - back - len(owners))
        return owners + owners[-1:] * (len(marked) - len(owners))

    def _marked_texts(self, turns: Sequence[Turn], tools: Tools, where: str) -> list[str]:
        text, marks = self._marked(turns, tools, where)
        return [text[slice(*mark)] for mark in marks]

    def _with_end(self, ids: Sequence[int], first: int, stop: int, end: int | None) -> int:
        """`stop`, or behind the token that ends a turn, where it follows and the span does not hold it."""
        behind = [token for token in ids[first:stop] if self.tokenizer.decode([token]).strip()][-1:]
        held = bool(behind) and behind[0] in self._special()
        return stop + 1 if end is not None and stop < len(ids) and ids[stop] == end and not held else stop

    def _by_texts(
        self, turns: Sequence[Turn], tools: Tools, where: str, wanted: Sequence[int]
    ) -> tuple[Encoded, Spans]:
        """Spans between the text before a turn and the text with it."""
        text = self.text(turns, tools, where)
        encoded = self.encoded(text, turns)
        ids, offsets = encoded.ids, encoded.offsets
        spans: Spans = {}
        for number in wanted:
            before = self.text(turns[:number], tools, where, prompt=True) if number else ""
            through = self.text(turns[: number + 1], tools, where)
            if not (text.startswith(before) and text.startswith(through)):
                continue
            start = len(before)
            if not number or before == self.text(turns[:number], tools, where):  # it knows no generation prompt
                start = self._start_of(turns[: number + 1], tools, start, where)
            first, end = _overlap(offsets, start, len(through))
            spans[number] = [(first, self._trimmed(ids, first, end))]
        return encoded, spans

    def _start_of(self, turns: Sequence[Turn], tools: Tools, before: int, where: str) -> int:
        """Where the last turn's text begins behind its opening: where another text in its place begins."""
        found = self.text([*turns[:-1], with_text(turns[-1], PROBE)], tools, where).find(PROBE, before)
        if found < 0:
            raise RowError(
                "whose answer cannot be told from its opening",
                f"{where}: the chat template {self.name} writes nothing for add_generation_prompt, so that the opening "
                "of an answer would be learned. Give a chat_template that does, or that marks turns with "
                "{% generation %}",
            )
        return found

    def _by_ids(self, turns: Sequence[Turn], tools: Tools, where: str, wanted: Sequence[int]) -> tuple[Encoded, Spans]:
        """The same by token ids, for tokenizers that do not tell which characters a token has."""
        ids = self._ids(turns, tools, where)
        spans: Spans = {}
        for number in wanted:
            before = self.prompt(turns[:number], tools, where) if number else []
            through = self._ids(turns[: number + 1], tools, where)
            if ids[: len(before)] == before and ids[: len(through)] == through:
                spans[number] = [(len(before), self._trimmed(ids, len(before), len(through)))]
        return Encoded(ids), spans

    def _unlike_its_prompt(self, number: int, where: str) -> RowError:
        return RowError(
            "with an answer unlike its prompt",
            f"{where}, turn {number}: the chat template {self.name} begins an answer otherwise than it writes this "
            "one, so that the model would learn what it is never asked for. Give a chat_template whose prompt begins "
            "its answers, or that marks them with {% generation %}",
        )

    def encoded(self, text: str, turns: Sequence[Turn]) -> Encoded:
        """Token ids of a rendered text and its turns."""
        if self.encode is not None:
            return self.encode(text, turns)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return Encoded(encoded["input_ids"], encoded["offset_mapping"])

    def _ids(self, turns: Sequence[Turn], tools: Tools, where: str) -> list[int]:
        ids: list[int] = _rendered(
            lambda: self.tokenizer.apply_chat_template(list(turns), tools=tools, return_dict=False, **self.options),
            self.name,
            where,
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


def _shape(turn: Turn) -> tuple[Any, ...]:
    """What a template may look at besides the texts themselves."""
    return turn["role"], *sorted(key for key, value in turn.items() if value), *sorted(set(TAGS.findall(str(turn))))


def _changed(turn: Turn) -> Turn:
    """The turn with other texts, and other names of called tools."""
    calls = [_renamed(call) for call in turn.get("tool_calls") or []]
    named = [key for key, value in turn.items() if key != "role" and isinstance(value, str) and (value or not calls)]
    texts = {key: f"{turn[key]}{PROBE}" for key in named}
    parts = with_longer_texts(turn, PROBE) if isinstance(turn["content"], list) else turn
    return {**parts, **texts, **({"tool_calls": calls} if calls else {})}


def _renamed(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    other = {**function, "name": f"{function.get('name')}{PROBE}"}
    return {**call, "function": other} if "function" in call else other


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many texts are the same from the first on."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))


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
