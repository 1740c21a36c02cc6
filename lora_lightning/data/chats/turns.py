"""Conversations as lists of turns, whatever layout the data have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.sources.texts import as_text
from lora_lightning.data.sources.unread import refuse_keys
from lora_lightning.errors import did_you_mean

Turn = dict[str, Any]
Content = Callable[[Any, str], Any]
"""What makes content, given with what to call its turn, into what a turn holds: text, or parts; None where none is."""

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Role by what data sets call it."""
LAYOUTS = (("role", "content"), ("from", "value"))
"""Keys of a turn: those of chat templates, and those of ShareGPT."""
WEIGHTS = ("weight", "train", "loss")
"""Keys that tell whether a turn is learned."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of what an assistant thinks before it answers."""
LEARNED = "__learned__"
"""Key of a turn that is not learned, which is False."""
OTHER, PARTS = "with turns of another shape", "with content that is no text"


def text_content(content: Any, where: str) -> str | None:
    """Content as text: of parts their texts one after another, of numbers their digits.

    Raises:
        RowError: a part that is no text.
    """
    if not isinstance(content, list):
        if isinstance(content, Mapping):
            keys = ", ".join(map(str, content))
            raise RowError(
                PARTS, f'{where}: its content is an object ({keys}); give text, or [{{"type": "text", "text": ...}}]'
            )
        return as_text(content)
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text" if isinstance(part, str) else "list"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(text, str):
            what = kind if kind != "text" else "text without a text"
            raise RowError(
                PARTS,
                f"{where}: its content has a part of type {what}; chats are learned as text alone, but for MediaChat",
            )
        texts.append(text)
    return "".join(texts)


def conversation(value: Any, where: str, content: Content = text_content) -> list[Turn]:
    """The turns of one cell, a list or its JSON text, as chat templates take them: role, content, and other keys.

    Keys without a value are left out, since tables give every turn the keys of all. Arguments of tool calls that are
    JSON text are read. Parts of text become one text. `LEARNED` says whether a turn is learned: as its weight, train or
    loss has it, and not where it is empty.

    Args:
        value: The cell.
        where: What to call it in messages.
        content: What makes what a turn holds of its content.

    Raises:
        RowError: no turns, a turn of another layout, an unknown role, or content that is no text.
    """
    turns = json_value(value, where)
    if not isinstance(turns, list) or not turns:
        raise RowError("without turns", f"{where} holds no turns; it must be a list of role and content")
    return [_turn(turn, f"{where}, turn {number}", content) for number, turn in enumerate(turns)]


def tool_list(value: Any, where: str) -> list[dict[str, Any]] | None:
    """The tools of one cell, a list of descriptions or its JSON text; None where there are none.

    Raises:
        RowError: it is neither.
    """
    tools = json_value(value, where) if value else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("with tools of another shape", f"{where} is no list of tool descriptions.")
    return [_filled(tool) for tool in tools]


def json_value(value: Any, where: str) -> Any:
    """`value`, read if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError("without turns", f"{where} is text, but no JSON: {error}") from error


def last_answer(turns: Sequence[Turn]) -> int:
    """Number of the last assistant turn that is learned; -1 where there is none."""
    answers = (n for n, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get(LEARNED, True))
    return max(answers, default=-1)


def without_first_exchange(turns: Sequence[Turn]) -> list[Turn] | None:
    """`turns` without the first question and what it led to; system turns at the front stay. None for one exchange."""
    front = next((number for number, turn in enumerate(turns) if turn["role"] not in ("system", "developer")), 0)
    later = next((n for n in range(front + 1, len(turns)) if turns[n]["role"] == "user"), None)
    return None if later is None else [*turns[:front], *turns[later:]]


def learned(turns: Sequence[Turn]) -> list[bool]:
    """Whether each turn is learned if it is the assistant's."""
    return [bool(turn.get(LEARNED, True)) for turn in turns]


def with_text(turn: Turn, text: str) -> Turn:
    """The turn with another text, as text or as a part, whichever it holds."""
    return {**turn, "content": [{"type": "text", "text": text}] if isinstance(turn["content"], list) else text}


def with_longer_texts(turn: Turn, text: str) -> Turn:
    """The turn, whose content is in parts, with `text` behind each of those that are texts, or behind all."""
    parts = [{**part, "text": part["text"] + text} if part["type"] == "text" else part for part in turn["content"]]
    return {**turn, "content": parts if parts != turn["content"] else [*parts, {"type": "text", "text": text}]}


def plain(turns: Sequence[Turn]) -> list[Turn]:
    """Turns as templates take them."""
    return [{key: value for key, value in turn.items() if key != LEARNED} for turn in turns]


def _turn(turn: Any, where: str, read: Content) -> Turn:
    if not isinstance(turn, Mapping):
        raise RowError(OTHER, f"{where} is {turn!r}; it must have role and content, or from and value")
    given = {key: value for key, value in turn.items() if value is not None}
    role_key, text_key = next((keys for keys in LAYOUTS if keys[0] in given), ("", ""))
    if not role_key:
        raise RowError(
            OTHER, f"{where} has {', '.join(given) or 'nothing'}; it needs role and content, or from and value"
        )
    role = str(given.pop(role_key))
    if role not in ROLES:
        known = f"{did_you_mean(role, ROLES)} Roles: {', '.join(ROLES)}"
        raise RowError("with an unknown role", f'{where} has the role "{role}".{known}')
    content = read(given.pop(text_key, None), where)
    weight = _weight(given, ROLES[role], where)
    refuse_keys(given, where)
    if calls := given.get("tool_calls"):
        given["tool_calls"] = [_call(call, where) for call in calls]
    empty = not content and not calls and not any(given.get(key) for key in REASONING)
    if content is None and empty and ROLES[role] != "assistant":
        there = ", ".join(given) or "nothing else"
        raise RowError("without content", f"{where} has the role {role} and no {text_key}, but {there}")
    made = {"role": ROLES[role], "content": content or "", **given}
    return made if weight and not (empty and ROLES[role] == "assistant") else {**made, LEARNED: False}


def _weight(given: Turn, role: str, where: str) -> bool:
    """Whether the turn's weight, train or loss, which are taken out of `given`, leave it to be learned."""
    wanted = True
    for key in WEIGHTS:
        value = given.pop(key, None)
        if value not in (None, 0, 1):
            raise RowError(
                "with a weight", f"{where} has {key}: {value!r}; a turn is learned (1 or true) or not (0 or false)"
            )
        if value and role != "assistant" and key != "weight":
            raise RowError(
                "with a weight", f"{where} has {key}: {value!r} and the role {role}; only the assistant is learned"
            )
        wanted = wanted and value in (None, 1)
    return wanted


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    filled: dict[str, Any] = _filled(call)
    function = filled.get("function", filled)
    if isinstance(function.get("arguments"), str):
        function["arguments"] = json_value(function["arguments"], f"{where}: arguments of a tool call")
    return filled


def _filled(value: Any) -> Any:
    """`value` without keys that have no value."""
    if isinstance(value, Mapping):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value
