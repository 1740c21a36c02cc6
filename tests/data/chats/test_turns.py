"""Conversations as lists of turns."""

from __future__ import annotations

import json

import pytest

from lora_lightning.data.chats.turns import (
    LEARNED,
    conversation,
    json_value,
    last_answer,
    learned,
    plain,
    tool_list,
    without_first_exchange,
)
from lora_lightning.errors import DataError

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    "value",
    [
        HI,
        json.dumps(HI),
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
        [{"from": "user", "value": "hi", "role": None}, {"from": "model", "value": "hello", "tool_calls": None}],
    ],
)
def test_layouts_are_brought_to_one(value):
    assert conversation(value, "row 0") == HI


def test_other_keys_stay_and_arguments_of_calls_are_read():
    call = {"function": {"name": "weather", "arguments": '{"city": "Rome"}', "extra": None}}
    (turn,) = conversation([{"role": "assistant", "tool_calls": [call], "mood": "calm"}], "row 0")
    assert turn == {
        "role": "assistant",
        "content": "",
        "mood": "calm",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    }
    flat = conversation([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}], "row 0")
    assert flat[0]["tool_calls"] == [{"name": "f", "arguments": {}}]


def test_the_data_stay_as_they_are():
    given = [{"role": "human", "content": "hi", "name": None}]
    conversation(given, "row 0")
    assert given == [{"role": "human", "content": "hi", "name": None}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"^row 7 holds no turns; it must be a list of role and content"),
        (
            [{"role": "asistant", "content": "x"}],
            r'^row 7, turn 0 has the role "asistant"\. Did you mean "assistant"\?',
        ),
        ([*HI, {"speaker": "a"}], r"^row 7, turn 2 has speaker; it needs role and content, or from and value"),
        ([{"role": None}], r"^row 7, turn 0 has nothing; it needs role"),
        (["hi"], r"^row 7, turn 0 is 'hi'; it must have role and content"),
        ("hi", r"^row 7 is text, but no JSON: Expecting value"),
        ([{"role": "assistant", "tool_calls": [{"arguments": "{"}]}], r"turn 0: arguments of a tool call is text, but"),
    ],
)
def test_what_is_no_conversation(value, message):
    with pytest.raises(DataError, match=message):
        conversation(value, "row 7")


def test_tools():
    described = [{"name": "f", "parameters": {"type": "object", "extra": None}}]
    expected = [{"name": "f", "parameters": {"type": "object"}}]
    assert tool_list(described, "row 0") == tool_list(json.dumps(described), "row 0") == expected
    assert tool_list(None, "row 0") is tool_list("", "row 0") is tool_list("[]", "row 0") is None
    for value in ("[1]", {"name": "f"}):
        with pytest.raises(DataError, match=r"^row 0 is no list of tool descriptions\.$"):
            tool_list(value, "row 0")


def test_json_or_the_value_itself():
    assert json_value('{"a": [1]}', "x") == {"a": [1]}
    assert json_value([1], "x") == [1]


def roles(turns) -> str:
    return "".join(turn["role"][0] for turn in turns)


def turns_of(letters: str):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "d": "developer"}
    return [{"role": names[letter], "content": str(n)} for n, letter in enumerate(letters)]


@pytest.mark.parametrize(("letters", "last"), [("uaua", 3), ("uau", 1), ("u", -1), ("", -1)])
def test_the_last_answer(letters, last):
    assert last_answer(turns_of(letters)) == last


@pytest.mark.parametrize(
    ("letters", "rest"),
    [("uaua", "ua"), ("suaua", "sua"), ("sduatauau", "sduau"), ("ua", None), ("sua", None), ("u", None), ("", None)],
)
def test_the_first_exchange_goes_with_all_that_it_led_to(letters, rest):
    turns = turns_of(letters)
    shorter = without_first_exchange(turns)
    assert (None if shorter is None else roles(shorter)) == rest
    assert shorter is None or all(turn in turns for turn in shorter)


def test_turns_that_are_not_learned():
    answers = [
        {},
        {"weight": 0},
        {"weight": 1},
        {"train": False},
        {"loss": 0},
        {"weight": 1.0, "train": True},
        {"weight": None},
    ]
    turns = conversation([{"role": "assistant", "content": "x", **keys} for keys in answers], "row 0")
    assert learned(turns) == [True, False, True, False, False, True, True]
    assert plain(turns) == [{"role": "assistant", "content": "x"}] * len(answers)
    empty = conversation([{"role": "assistant", "content": ""}, {"role": "assistant", "reasoning": "x"}], "row 0")
    assert learned(empty) == [False, True]
    assert last_answer(turns[:2]) == 0
    assert LEARNED in turns[1]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            {"role": "assistant", "content": "x", "weight": 0.5},
            r"^row 7, turn 0 has weight: 0\.5; a turn is learned \(1 or",
        ),
        ({"role": "user", "content": "x", "train": True}, r"has train: True and the role user; only the assistant is"),
        (
            {"role": "assistant", "content": "x", "trainable": False},
            r"^row 7, turn 0 has trainable: False, which is not read\. Write weight: 0 or train: false",
        ),
        ({"from": "gpt", "value": "x", "mask": True}, r"^row 7, turn 0 has mask: True, which is not read"),
        ({"role": "user", "text": "x"}, r"^row 7, turn 0 has the role user and no content, but text$"),
        ({"role": "user", "content": {"a": 1}}, r"its content is an object \(a\); give text, or \[{\"type\": \"text\""),
        (
            {"role": "user", "content": [{"type": "image"}]},
            r"its content has a part of type image; chats are learned as text",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, r"has a part of type text without a text"),
        ({"role": "user", "content": [["x"]]}, r"has a part of type list"),
    ],
)
def test_what_a_turn_cannot_carry(turn, message):
    with pytest.raises(DataError, match=message):
        conversation([turn], "row 7")


@pytest.mark.parametrize(
    ("content", "text"),
    [(0, "0"), (False, "false"), (1.5, "1.5"), (["a", {"type": "text", "text": "b"}], "ab"), ([], "")],
)
def test_content_is_text(content, text):
    assert conversation([{"role": "user", "content": content}], "x") == [{"role": "user", "content": text}]
