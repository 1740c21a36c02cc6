"""Rows to token ids: columns, row numbers, what is cut, and a bar for long work."""

from __future__ import annotations

import datasets
import pytest

from lora_lightning.data.tokens import encoding
from lora_lightning.data.tokens.encoding import encode_texts, tokenised
from lora_lightning.data.tokens.tokenizers import load_tokenizer

ROWS = datasets.Dataset.from_dict({"a": ["good film", "tea"], "b": ["bad", "dog cat it"], "n": [1, 2]})


def test_texts_and_pairs(encoder_tokenizer):
    tokenizer = load_tokenizer(encoder_tokenizer)
    single = encode_texts(ROWS, ["a"], tokenizer, 8)
    assert single["input_ids"][:] == [tokenizer(text)["input_ids"] for text in ROWS["a"]]
    assert single["index"][:] == [0, 1]
    assert set(single.column_names) == {"input_ids", "token_type_ids", "attention_mask", "index", "truncated"}
    pairs = encode_texts(ROWS, ["a", "b"], tokenizer, 8)
    assert pairs["input_ids"][:] == tokenizer(ROWS["a"][:], ROWS["b"][:])["input_ids"]


def test_what_is_cut_is_told_and_what_just_fits_is_not(encoder_tokenizer):
    tokenizer = load_tokenizer(encoder_tokenizer)  # "good film" is four tokens, "tea" three
    assert encode_texts(ROWS, ["a"], tokenizer, 4)["truncated"][:] == [False, False]
    assert encode_texts(ROWS, ["a"], tokenizer, 3)["truncated"][:] == [True, False]


def test_numbers_are_texts_too(encoder_tokenizer):
    tokenizer = load_tokenizer(encoder_tokenizer)
    assert encode_texts(ROWS, ["n"], tokenizer, 8)["input_ids"][0] == tokenizer("1")["input_ids"]


def test_rows_may_become_fewer_and_are_numbered_across_batches():
    rows = datasets.Dataset.from_dict({"x": list(range(2500))})
    even = tokenised(
        rows, lambda batch, numbers: {"index": [n for n, x in zip(numbers, batch["x"], strict=True) if x % 2 == 0]}
    )
    assert even["index"][:] == list(range(0, 2500, 2))
    assert even.cache_files == []


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_long_work_shows_a_bar(monkeypatch, capsys, seconds):
    monkeypatch.setattr(encoding, "SILENT", seconds)
    tokenised(ROWS, lambda batch, numbers: {"index": numbers})
    assert ("tokenising" in capsys.readouterr().err) == (seconds == 0.0)
    assert not datasets.are_progress_bars_disabled()
