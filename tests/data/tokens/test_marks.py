"""Token ids back to text, with what carries no loss in double brackets."""

from __future__ import annotations

import pytest

from lora_lightning.data.tokens.marks import mark
from lora_lightning.data.tokens.tokenizers import load_tokenizer

IDS = [4, 20, 21, 17, 5]  # <s> what is tea </s>


@pytest.mark.parametrize(
    ("learned", "text"),
    [
        ({3, 4}, "[[<s> what is]]tea </s>"),
        ({1, 3}, "[[<s>]]what[[is]]tea[[</s>]]"),
        (set(range(5)), "<s> what is tea </s>"),
        (set(), "[[<s> what is tea </s>]]"),
    ],
)
def test_stretches_without_loss_are_in_brackets(causal_tokenizer, learned, text):
    labels = [token if place in learned else -100 for place, token in enumerate(IDS)]
    assert mark(IDS, labels, load_tokenizer(causal_tokenizer)) == text


def test_no_tokens(causal_tokenizer):
    assert mark([], [], load_tokenizer(causal_tokenizer)) == ""
