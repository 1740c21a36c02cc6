"""Rows that compare completions, in the forms that data sets have them."""

from __future__ import annotations

import json

import pytest

from lora_lightning.data.chats.compared import Texts, Turns, compared, desirable
from lora_lightning.data.sources.faults import RowError


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


ASKED = [user("sky?")]


@pytest.mark.parametrize(
    ("prompt", "completions", "begin", "rest"),
    [
        ("The sky", [" is blue", " is green"], "The sky", [" is blue", " is green"]),
        (None, ["The sky is blue", "The sky is green"], "The sky is", [" blue", " green"]),
        (None, ["The sky is blue", "The sky is blush"], "The sky is", [" blue", " blush"]),
        (None, ["Q: sky?\nblue", "Q: sky?\ngreen"], "Q: sky?\n", ["blue", "green"]),
        (None, ["Q: sky?\n\nA: blue now", "Q: sky?\n\nA: blue then"], "Q: sky?\n\nA: blue", [" now", " then"]),
        (None, ["The sky is", "The sky is blue"], "The sky", [" is", " is blue"]),
        ("The sky", [" is blue"], "The sky", [" is blue"]),
    ],
)
def test_texts(prompt, completions, begin, rest):
    assert compared(prompt, completions, "row") == Texts(begin, tuple(rest))


FORMS = {
    "apart": (ASKED, [[says("blue")], [says("green")]]),
    "implicit": (None, [[*ASKED, says("blue")], [*ASKED, says("green")]]),
    "the prompt as a text once more": ("sky?", [[*ASKED, says("blue")], [*ASKED, says("green")]]),
    "the prompt as turns once more": (ASKED, [[*ASKED, says("blue")], [*ASKED, says("green")]]),
    "the prompt as a text alone": ("sky?", [[says("blue")], [says("green")]]),
    "as JSON": (json.dumps(ASKED), [json.dumps([says("blue")]), json.dumps([says("green")])]),
    "of ShareGPT": (
        None,
        [[{"from": "human", "value": "sky?"}, {"from": "gpt", "value": text}] for text in ("blue", "green")],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_turns(name):
    prompt, completions = FORMS[name]
    assert compared(prompt, completions, "row") == Turns(ASKED, ([says("blue")], [says("green")]))


def test_what_two_conversations_share_is_whole_turns():
    talk = [user("a"), says("b"), user("c")]
    found = compared(None, [[*talk, says("d")], [*talk, says("e"), user("f"), says("g")]], "row")
    assert found == Turns(talk, ([says("d")], [says("e"), user("f"), says("g")]))


def test_one_completion_that_holds_its_prompt():
    assert compared(None, [[*ASKED, says("blue")]], "row") == Turns(ASKED, ([says("blue")],))


@pytest.mark.parametrize(
    ("prompt", "completions", "text"),
    [
        ("x", ["same", "same"], "the chosen completion is the rejected one"),
        (None, ["blue sky", "green sky"], "share no first word, and there is no prompt"),
        (None, [[says("blue")], [says("green")]], "share no first turn, and there is no prompt"),
        (ASKED, [[says("a")], [says("a")]], "the chosen completion is the rejected one"),
        (ASKED, ["blue", "green"], "texts and turns stand side by side"),
        (None, [[*ASKED, says("blue")], "green"], "texts and turns stand side by side"),
        (ASKED, [[says("blue")], [user("green")]], "must end with a turn of the assistant's"),
        (ASKED, [[says("blue")], [says("")]], "must end with a turn of the assistant's that has a text"),
        (ASKED, [[says("blue")], [{"role": "asistant", "content": "x"}]], 'role "asistant". Did you mean "assistant"'),
    ],
)
def test_rows_that_cannot_be_used(prompt, completions, text):
    with pytest.raises(RowError, match=text):
        compared(prompt, completions, "row")


@pytest.mark.parametrize(("value", "expected"), [(True, 1), ("True", 1), (1, 1), ("0", 0), (False, 0), (" false ", 0)])
def test_labels(value, expected):
    assert desirable(value, "row") == expected


@pytest.mark.parametrize("value", ["yes", None, 2, ""])
def test_other_labels(value):
    with pytest.raises(RowError, match=r"label is .*; it must be true or false, or 1 or 0"):
        desirable(value, "label")
