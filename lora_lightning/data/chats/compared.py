"""Rows that compare completions: a prompt with a chosen and a rejected one, or with one that is good or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lora_lightning.data.chats.turns import Turn, conversation, last_answer
from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.sources.texts import as_text

TRUTH = {"true": 1, "1": 1, "false": 0, "0": 0}
"""Whether a completion is good, by what tables write."""


@dataclass(frozen=True)
class Texts:
    """A prompt and its completions as texts."""

    prompt: str
    completions: tuple[str, ...]


@dataclass(frozen=True)
class Turns:
    """A prompt and its completions as turns."""

    prompt: list[Turn]
    completions: tuple[list[Turn], ...]


def compared(prompt: Any, completions: Sequence[Any], where: str) -> Texts | Turns:
    """A row's prompt and completions.

    Without a prompt, or with one that is text beside completions that are turns, what two completions begin with alike
    is the prompt. Of texts that is whole words: a blank before the first word that differs belongs to the completions.
    Of turns that is whole turns; where there are none, a prompt that is text is the user's turn. Completions that begin
    with the prompt's turns once more are taken without them.

    Args:
        prompt: a text, a list of turns or its JSON text, or None.
        completions: one or two, of one form.
        where: what to call the row in messages.

    Raises:
        RowError: texts beside turns, two equal completions, no prompt, or turns that cannot be used.
    """
    sides = [_turns(value) for value in completions]
    asked = _turns(prompt)
    if len({side is None for side in sides}) > 1 or (asked is not None and sides[0] is None):
        raise RowError("with a text beside turns", f"{where}: texts and turns stand side by side; give all in one form")
    if sides[0] is None:
        return _texts(prompt, [as_text(value) or "" for value in completions], where)
    answers = [conversation(side, f"{where}, completion {n}") for n, side in enumerate(sides)]
    _refuse_equal(answers, where)
    if asked is not None:
        begin = conversation(asked, f"{where}, prompt")
        answers = [side[len(begin) :] if side[: len(begin)] == begin else side for side in answers]
    else:
        shared = _shared(answers) if len(answers) > 1 else len(answers[0]) - 1
        begin, answers = answers[0][:shared], [side[shared:] for side in answers]
        if not begin and (text := as_text(prompt)):
            begin = [{"role": "user", "content": text}]
    if not begin:
        raise RowError("without a prompt", f"{where}: its completions share no first turn, and there is no prompt")
    for side in answers:
        if not side or last_answer(side) != len(side) - 1:
            raise RowError(
                "without an assistant turn",
                f"{where}: a completion must end with a turn of the assistant's that has a text and counts",
            )
    return Turns(begin, tuple(answers))


def desirable(value: Any, where: str) -> int:
    """Whether a completion is good, 1 or 0.

    Raises:
        RowError: the value is neither true nor false.
    """
    text = (as_text(value) or "").strip().lower()
    if text not in TRUTH:
        raise RowError("with another label", f"{where} is {value!r}; it must be true or false, or 1 or 0")
    return TRUTH[text]


def _texts(prompt: Any, completions: list[str], where: str) -> Texts:
    _refuse_equal(completions, where)
    if prompt is not None or len(completions) == 1:
        return Texts(as_text(prompt) or "", tuple(completions))
    alike = takewhile(lambda letters: letters[0] == letters[1], zip(*completions, strict=False))
    begin = "".join(letter for letter, _ in alike)
    blank = max((n for n, letter in enumerate(begin) if letter.isspace()), default=-1)
    begin = begin[: blank if begin[blank : blank + 1] == " " else blank + 1]
    if not begin.strip():
        raise RowError("without a prompt", f"{where}: its completions share no first word, and there is no prompt")
    return Texts(begin, tuple(text[len(begin) :] for text in completions))


def _refuse_equal(completions: Sequence[object], where: str) -> None:
    if len(completions) > 1 and completions[0] == completions[1]:
        raise RowError("with equal completions", f"{where}: the chosen completion is the rejected one")


def _shared(sides: Sequence[Sequence[Turn]]) -> int:
    """How many turns both begin with, but for the last of each."""
    most = min(map(len, sides)) - 1
    return next((n for n in range(most) if sides[0][n] != sides[1][n]), most)


def _turns(value: Any) -> Any:
    """A value that is a list of turns, or the JSON text of one; None for other values."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list) or not value:
        return None
    return value if all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value) else None
