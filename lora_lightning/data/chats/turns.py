"""Conversations as lists of turns, whatever layout the data have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.errors import DataError, did_you_mean

Turn = dict[str, Any]

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


def conversation(value: Any, where: str) -> list[Turn]:
    """The turns of one cell, a list or its JSON text, as chat templates take them: role, content, and other keys.

    Keys without a value are left out, since tables give every turn the keys of all. Arguments of tool calls that are
    JSON text are read.

    Raises:
        DataError: no turns, a turn of another layout, or an unknown role.
    """
    turns = json_value(value, where)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where} holds no turns; it must be a list of role and content.")
    return [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns)]


def tool_list(value: Any, where: str) -> list[dict[str, Any]] | None:
    """The tools of one cell, a list of descriptions or its JSON text; None where there are none.

    Raises:
        DataError: it is neither.
    """
    tools = json_value(value, where) if value else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where} is no list of tool descriptions.")
    return [_filled(tool) for tool in tools]


def json_value(value: Any, where: str) -> Any:
    """`value`, read if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is text, but no JSON: {error}.") from error


def last_answer(turns: Sequence[Turn]) -> int:
    """Number of the last assistant turn; -1 where there is none."""
    return max((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)


def without_first_exchange(turns: Sequence[Turn]) -> list[Turn] | None:
    """`turns` without the first question and what it led to; system turns at the front stay. None for one exchange."""
    front = next((number for number, turn in enumerate(turns) if turn["role"] not in ("system", "developer")), 0)
    later = next((n for n in range(front + 1, len(turns)) if turns[n]["role"] == "user"), None)
    return None if later is None else [*turns[:front], *turns[later:]]


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {turn!r}; it must have role and content, or from and value.")
    given = {key: value for key, value in turn.items() if value is not None}
    role_key, text_key = next((keys for keys in LAYOUTS if keys[0] in given), ("", ""))
    if not role_key:
        raise DataError(f"{where} has {', '.join(given) or 'nothing'}; it needs role and content, or from and value.")
    role = str(given.pop(role_key))
    if role not in ROLES:
        raise DataError(f'{where} has the role "{role}".{did_you_mean(role, ROLES)} Roles: {", ".join(ROLES)}.')
    content = given.pop(text_key, "")
    if calls := given.get("tool_calls"):
        given["tool_calls"] = [_call(call, where) for call in calls]
    return {"role": ROLES[role], "content": content, **given}


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
