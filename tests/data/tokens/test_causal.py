"""Start tokens, end tokens, and what is cut."""

from __future__ import annotations

import pytest

from lora_lightning.data.tokens.causal import completion_example, start_ids
from lora_lightning.data.tokens.tokenizers import load_tokenizer

START, END = 4, 5


@pytest.mark.parametrize(
    ("fixture", "expected"), [("causal_tokenizer", [START]), ("bare_tokenizer", []), ("encoder_tokenizer", [2])]
)
def test_start_tokens(request, fixture, expected):
    assert start_ids(load_tokenizer(request.getfixturevalue(fixture))) == expected


@pytest.mark.parametrize(
    ("max_length", "ids", "targets"),
    [
        (8, [1, 11, 12, 13, 14, 21, 22, 23], 3),
        (7, [1, 12, 13, 14, 21, 22, 23], 3),  # the prompt gives way from its left, its start token stays
        (5, [1, 14, 21, 22, 23], 3),
        (4, [1, 21, 22, 23], 3),
        (3, [1, 21, 22], 2),  # then the completion from its right
        (2, [1, 21], 1),
    ],
)
def test_cutting(max_length, ids, targets):
    example = completion_example([1], [11, 12, 13, 14], [21, 22, 23], max_length)
    assert example["input_ids"] == ids
    assert example["labels"] == [-100] * (len(ids) - targets) + ids[len(ids) - targets :]
    assert example["attention_mask"] == [1] * len(ids)


def test_cutting_without_start_token_keeps_one_token_of_the_prompt():
    assert completion_example([], [11, 12], [21, 22, 23], 3)["input_ids"] == [12, 21, 22]
    assert completion_example([], [], [21, 22, 23], 3)["input_ids"] == [21, 22, 23]
