from __future__ import annotations

import pytest
from lightning.pytorch import LightningDataModule

from lora_lightning.data import Completions, LabelledText, PlainText
from lora_lightning.data.inspect import LEGEND, show_examples
from lora_lightning.errors import DataError


def test_completions(write, causal_tokenizer):
    rows = [
        {"prompt": "what is it", "completion": "good tea"},
        {"prompt": "a b c d e f g h", "completion": "no"},
        {"prompt": "x", "completion": ""},
    ]
    data = Completions(train=write("t.json", rows), tokenizer=causal_tokenizer, max_length=8, validation_fraction=0.0)
    data.setup("fit")
    assert show_examples(data, 5).splitlines() == [
        "split        examples  truncated  tokens: min  median   max",
        "train               2      50.0%            7       8     8",
        "dropped from train: 1 examples without a token to learn",
        "",
        LEGEND,
        "",
        "--- train example 0: 7 tokens",
        "[[<s> what is it]]good tea </s>",
        "",
        "--- train example 1: 8 tokens",
        "[[<s> d e f g h]]no </s>",
    ]


def test_packing_is_told(write, causal_tokenizer):
    rows = [{"prompt": "what is it", "completion": "good tea"}, {"prompt": "a", "completion": "b c"}]
    data = Completions(
        train=write("t.json", rows), tokenizer=causal_tokenizer, max_length=16, validation_fraction=0.0, packing=True
    )
    data.setup("fit")
    assert show_examples(data, 0).splitlines()[2] == "packing: train has 1 rows of 16 tokens, 75.0% full"


def test_labelled(write, encoder_tokenizer):
    rows = [{"text": "good film", "label": "yes"}, {"text": "bad", "label": "no"}]
    data = LabelledText(train=write("t.json", rows), validation=write("v.json", rows), tokenizer=encoder_tokenizer)
    data.setup("fit")
    shown = show_examples(data, 1)
    assert shown.endswith("--- train example 0: label yes\n[CLS] good film [SEP]")
    assert [line.split() for line in shown.splitlines()[1:3]] == [
        ["train", "2", "0.0%", "3", "4", "4"],
        ["validation", "2", "0.0%", "3", "4", "4"],
    ]
    assert LEGEND not in shown


def test_regression_and_plain_text(write, encoder_tokenizer, causal_tokenizer):
    source = write("t.json", [{"text": "good", "label": 0.5}])
    scored = LabelledText(train=source, regression=True, tokenizer=encoder_tokenizer, validation_fraction=0.0)
    plain = PlainText(train=source, tokenizer=causal_tokenizer, validation_fraction=0.0)
    for data, expected in ((scored, "label 0.5\n[CLS] good [SEP]"), (plain, "3 tokens\n<s> good </s>")):
        data.setup("fit")
        assert show_examples(data).endswith(f"--- train example 0: {expected}")


def test_foreign_data_module():
    with pytest.raises(DataError, match=r"^data is LightningDataModule; only these can be inspected: Chat, "):
        show_examples(LightningDataModule())
