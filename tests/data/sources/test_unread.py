"""Columns and keys that weigh, mask or leave out what is learned elsewhere: refused where they would, else named."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import lora_lightning.data
from lora_lightning.data import Chat, Completions, TextPairs
from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.sources.unread import Changing, kind_of, refuse_keys
from lora_lightning.data.table import TableData
from lora_lightning.errors import DataError

HI = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "it is"}]
ROWS = {
    "Chat": {"messages": HI},
    "Completions": {"prompt": "what", "completion": "it is"},
    "LabelledImages": {"image": "1.png", "label": "dark"},
    "LabelledText": {"text": "a film", "label": "good"},
    "MaskedText": {"text": "a film"},
    "MediaChat": {"messages": HI},
    "MultiLabelText": {"text": "a film", "labels": ["good", "bad"]},
    "PlainText": {"text": "a film"},
    "Preferences": {"prompt": "what", "chosen": "a", "rejected": "b"},
    "TaggedWords": {"tokens": ["a", "b"], "tags": ["O", "X"]},
    "TextPairs": {"anchor": "a", "positive": "b"},
    "TextToText": {"source": "a", "target": "b"},
}
MODULES = {name: getattr(lora_lightning.data, name) for name in lora_lightning.data.__all__}
MODULES = {name: kind for name, kind in MODULES.items() if issubclass(kind, TableData) and name in ROWS}


def test_every_data_module_is_tried():
    tables = {n for n in lora_lightning.data.__all__ if issubclass(getattr(lora_lightning.data, n), TableData)}
    assert tables - {"CausalText"} == set(ROWS)


@pytest.fixture
def module(write, tmp_path):
    def module(kind, *rows, **settings):
        Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
        return kind(train=write("train.jsonl", "\n".join(map(json.dumps, rows))), validation_fraction=0.0, **settings)

    return module


@pytest.mark.parametrize("name", ROWS)
def test_a_weight_beside_rows_of_every_kind(module, name, caplog):
    """One of 0 is an error with its row; 1 everywhere is named once; `ignore` takes the column away."""
    row = ROWS[name]
    with pytest.raises(DataError, match=r'^train\.jsonl, line 2: .* has 0 in the column "weight", .* data\.ignore'):
        module(MODULES[name], {**row, "weight": 1}, {**row, "weight": 0}).read("train")
    plain = module(MODULES[name], {**row, "weight": 1}, {**row, "weight": 1.0})
    assert len(plain.read("train")) == 2
    plain.read("train")
    assert caplog.text.count("train.jsonl: columns that change nothing are not read: weight") == 1
    assert caplog.text.count("weight") == 1
    ignored = module(MODULES[name], {**row, "weight": 0}, {**row, "weight": 0.5}, ignore=["weight"]).read("train")
    assert set(ignored.column_names) >= set(row)
    assert "weight" not in ignored.column_names


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("Sample Weight", "0.25"),
        ("train", False),
        ("trainable", "false"),
        ("loss_mask", [1, 0, 1]),
        ("mask", 1),
        ("isTrain", 0),
        ("system", "be kind"),
        ("rejected", "it is not"),
        ("kto_tag", False),
        ("label", "False"),
    ],
)
def test_columns_that_would_change_what_is_learned(module, column, value):
    row = ROWS["Completions"]
    with pytest.raises(DataError, match=rf'^train\.jsonl, line 1: .* in the column "{column}", which it does not read'):
        module(Completions, {**row, column: value}).read("train")
    assert len(module(Completions, {**row, column: None}).read("train")) == 1
    skipping = module(Completions, {**row, column: value}, {**row, column: None}, on_error="skip")
    assert len(skipping.read("train")) == 1
    assert f'1 with a value in "{column}"' in skipping.sources.told("train")


def test_a_column_that_is_read_is_no_weight(module):
    rows = [{"prompt": "what", "weight": "0"}]
    assert module(Completions, *rows, completion="weight").read("train")["weight"][:] == ["0"]
    template = module(Completions, *[{**ROWS["Completions"], "weight": 0}], prompt_template="{prompt} {weight}")
    assert len(template.read("train")) == 1


def test_rows_to_predict_have_no_weight(module):
    row = {**ROWS["Completions"], "weight": 0}
    data = module(Completions, row)
    data = Completions(predict=data.sources.train)
    assert len(data.read("predict")) == 1


def test_whoever_names_the_chosen_answer_learns_it_alone(module):
    pair = {"prompt": "what", "chosen": "a", "rejected": "b"}
    assert len(module(Completions, pair, completion="chosen").read("train")) == 1
    talk = {"chosen": HI, "rejected": HI[:1]}
    assert len(module(Chat, talk, messages="chosen").read("train")) == 1
    with pytest.raises(DataError, match="Preferences learns such rows"):
        module(Chat, {"messages": HI, "rejected": "b"}).read("train")


def test_pairs_that_do_not_belong_together(module):
    rows = [{"anchor": "a", "positive": "b", "label": 1}, {"anchor": "a", "positive": "c", "label": 0}]
    with pytest.raises(DataError, match=r'line 2: TextPairs has 0 in the column "label", .* unless data\.score names'):
        module(TextPairs, *rows).read("train")
    assert len(module(TextPairs, *rows, score="label").read("train")) == 2


def test_weights_of_a_stream(module, causal_tokenizer):
    row = ROWS["Completions"]
    settings = {"streaming": True, "tokenizer": causal_tokenizer}
    data = module(Completions, {**row, "weight": 1}, {**row, "weight": 0}, **settings)
    with pytest.raises(DataError, match=r'^train\.jsonl, line 2: Completions has 0 in the column "weight"'):
        list(data.read("train"))
    ignored = module(Completions, {**row, "weight": 0}, ignore=["weight"], **settings)
    assert "weight" not in next(iter(ignored.read("train")))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("weights", "weight"),
        ("classWeight", "weight"),
        ("loss_scale", "weight"),
        ("training", "flag"),
        ("assistant_masks", "mask"),
        ("train_detail", "unclear mask"),
        ("attention_mask", None),
        ("weight_kg", None),
        ("trainer", None),
        ("text", None),
    ],
)
def test_names(name, kind):
    assert kind_of(name) == kind


def test_values_that_are_of_another_kind_change_nothing():
    """A product's weight in words, the name of a train, a file with a mask."""
    assert not Changing("weight").changes("12 kg")
    assert not Changing("flag").changes("ICE 74")
    assert not Changing("unclear mask").changes("masks/1.png")
    assert not Changing("verdict").changes(0)
    assert not Changing("value").changes([])
    assert Changing("weight").changes("nan")


@pytest.mark.parametrize(
    "key", [{"trainable": False}, {"mask": True}, {"train_detail": [{"begin_offset": 0}]}, {"token_weights": [1, 0]}]
)
def test_keys_of_turns(key):
    with pytest.raises(RowError, match=rf"^row 7 has {next(iter(key))}: .*Write weight: 0 or train: false"):
        refuse_keys({"content": "x", **key}, "row 7")
    refuse_keys({"trainable": True, "mask": None, "name": "Ann"}, "row 7")
