"""Labels of rows: the same rules for every kind of data that has them."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lora_lightning.data import LabelledImages, LabelledText, MultiLabelText, TaggedWords
from lora_lightning.errors import DataError

KINDS = ["LabelledText", "MultiLabelText", "TaggedWords", "LabelledImages"]


@pytest.fixture
def make(tmp_path, encoder_tokenizer):
    """Data of a kind with one label a row, which is a list of one where the kind has lists."""
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")

    def rows(kind: str, labels: list[str]) -> list[dict[str, object]]:
        if kind == "TaggedWords":
            return [{"tokens": [f"word{n}"], "tags": [label]} for n, label in enumerate(labels)]
        if kind == "LabelledImages":
            return [{"image": "image.png", "label": label} for label in labels]
        many = kind == "MultiLabelText"
        return [{"text": f"t {n}", **({"labels": [x]} if many else {"label": x})} for n, x in enumerate(labels)]

    def make(kind: str, **settings):
        for split in ("train", "validation", "test", "predict"):
            if isinstance(labels := settings.get(split), list):
                made = rows(kind, labels)
                if split == "predict":
                    made = [dict([next(iter(row.items()))]) for row in made]  # the input alone
                (tmp_path / f"{split}.json").write_text(json.dumps(made))
                settings[split] = str(tmp_path / f"{split}.json")
        if kind == "LabelledImages":
            return LabelledImages(**{"size": 4, "validation_fraction": 0.0, **settings})
        cls = {"LabelledText": LabelledText, "MultiLabelText": MultiLabelText, "TaggedWords": TaggedWords}[kind]
        return cls(**{"tokenizer": encoder_tokenizer, "validation_fraction": 0.0, **settings})

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_of_all_training_rows(make, kind):
    """Neither a limit nor what is held out hides a label."""
    data = make(kind, train=["b"] * 29 + ["a"], limit=2, validation_fraction=0.5)
    assert (data.num_labels, data.label_names) == (2, ["a", "b"])


@pytest.mark.parametrize("kind", KINDS)
def test_listed_names_need_no_training_rows(make, kind):
    data = make(kind, test=["y", "x"], labels=["x", "y", "z"])
    data.setup("test")
    assert (data.num_labels, data.label_names) == (3, ["x", "y", "z"])
    found = data.examples("test").with_format(None)["labels"][:]
    expected = {
        "LabelledText": [1, 0],
        "MultiLabelText": [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]],
        "TaggedWords": [[-100, 1, -100, -100], [-100, 0, -100, -100]],
        "LabelledImages": [1, 0],
    }
    if kind == "TaggedWords":  # a word's first token carries its tag
        assert [[n for n in labels if n != -100] for labels in found] == [[1], [0]]
    else:
        assert found == expected[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_without_names_and_training_rows_there_are_none(make, kind):
    data = make(kind, test=["y", "x"])
    with pytest.raises(DataError, match=rf"^{kind}\.labels is null, and so is train, .* list the names in labels\.$"):
        data.setup("test")


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_that_nobody_knows_is_named_with_split_column_and_row(make, kind):
    data = make(kind, train=["warm", "cold"], validation=["warm", "wram"])
    setting, column = {"TaggedWords": ("tags", "tags"), "MultiLabelText": ("label", "labels")}.get(
        kind, ("label", "label")
    )
    where = rf'^validation\.json, row 1 \(.*\): {kind}\.{setting}, column "{column}": '
    message = rf'{where}.*\'wram\' is not a known label\..*"warm"\?'
    with pytest.raises(DataError, match=message):
        data.setup("fit")


@pytest.mark.parametrize("kind", KINDS)
def test_the_column_must_exist_but_for_predict(make, kind):
    setting = "tags" if kind == "TaggedWords" else "label"
    data = make(kind, train=["x", "y"], predict=["x"], **{setting: "lable"})
    with pytest.raises(DataError, match=rf'^{kind}\.{setting} is "lable"; train\.json has the columns '):
        data.read("train")
    assert len(data.read("predict")) == 1
    assert data.read("validation") is None
