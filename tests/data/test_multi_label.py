from __future__ import annotations

import pytest
import torch

from lora_lightning.data import MultiLabelText
from lora_lightning.data.inspect import show_examples
from lora_lightning.errors import DataError, SettingsError

LINES = 'text,labels\ngood film,"warm, long"\nbad tea,\nthe dog,long\n'


@pytest.fixture
def make(write, encoder_tokenizer):
    def make(content=LINES, name="train.csv", **settings) -> MultiLabelText:
        settings = {"tokenizer": encoder_tokenizer, "validation_fraction": 0.0, **settings}
        return MultiLabelText(train=write(name, content), **settings)

    return make


def test_names_with_a_mark_between(make):
    data = make(batch_size=3)
    data.setup("fit")
    assert data.label_names == ["long", "warm"]
    assert data.examples("train")["labels"][:] == [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    [batch] = data.train_dataloader()
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].sum(0).tolist() == [2.0, 1.0]
    assert show_examples(data, 2).splitlines()[-5:] == [
        "--- train example 0: labels long, warm",
        "[CLS] good film [SEP]",
        "",
        "--- train example 1: labels (none)",
        "[CLS] bad tea [SEP]",
    ]


def test_lists_of_numbers_and_given_names(make):
    rows = [{"text": "good", "labels": [0, 2]}, {"text": "bad", "labels": []}]
    data = make(rows, "train.json", labels=["x", "y", "z"])
    data.setup("fit")
    assert data.examples("train")["labels"][:] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert data.readable({"text": "good", "labels": [0, 2], "prediction": ""})["labels"] == "x, z"


def test_rows_to_predict_need_no_labels(make, write):
    data = make(predict=write("new.csv", "text\ngood\n"))
    data.setup("predict")
    [batch] = data.predict_dataloader()
    assert "labels" not in batch


@pytest.mark.parametrize(
    ("rows", "settings", "text"),
    [
        (
            [{"text": "a", "labels": 1.5}],
            {},
            r'row 0 .*1.5 is neither a list nor names with ","',
        ),
        ([{"text": "a", "labels": ["x"]}], {}, r"labels are \['x'\]; at least 2 are needed.*use LabelledText"),
        (
            [{"text": "a", "labels": ["warm", "lng"]}],
            {"labels": ["warm", "long"]},
            r"row 0.*'lng' is not a known label. Did you mean \"long\"",
        ),
    ],
)
def test_rows_that_do_not_fit(make, rows, settings, text):
    data = make(rows, "train.json", **settings)
    with pytest.raises(DataError, match=text):
        data.setup("fit")


def test_a_delimiter_is_needed(make):
    with pytest.raises(SettingsError, match=r"MultiLabelText.delimiter is ' '"):
        make(delimiter=" ")
