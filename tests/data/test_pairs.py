from __future__ import annotations

import pytest
import torch

from lora_lightning.data import TextPairs
from lora_lightning.data.inspect import show_examples
from lora_lightning.errors import DataError, SettingsError

ROWS = [
    {"anchor": "good film", "positive": "it is good", "far": "tea", "near": 0.9},
    {"anchor": "dog", "positive": "the dog", "far": "a b c d", "near": -0.5},
    {"anchor": "tea", "positive": "a tea", "far": "dog", "near": 0},
]


@pytest.fixture
def make(write, encoder_tokenizer):
    def make(rows=ROWS, **settings) -> TextPairs:
        settings = {"tokenizer": encoder_tokenizer, "validation_fraction": 0.0, "batch_size": 3, **settings}
        return TextPairs(train=write("train.json", rows), **settings)

    return make


def test_texts_stand_side_after_side(make):
    data = make(negative="far")
    data.setup("fit")
    assert data.task_kinds == ("sentence-embedding",)
    [batch] = data.train_dataloader()
    order = list(data.train_dataloader().sampler)
    rows = data.examples("train")
    expected = [rows[row]["input_ids"][side] for side in range(3) for row in order]
    width = max(map(len, expected))
    pad = data.tokenizer_object.pad_token_id
    assert batch["input_ids"].tolist() == [ids + [pad] * (width - len(ids)) for ids in expected]
    assert batch["attention_mask"].sum(1).tolist() == [len(ids) for ids in expected]
    assert int(batch["sides"]) == 3


def test_scores(make):
    data = make(score="near")
    data.setup("fit")
    assert data.task_kinds == ("sentence-similarity",)
    [batch] = data.train_dataloader()
    assert batch["labels"].dtype == torch.float32
    assert sorted(batch["labels"].tolist()) == pytest.approx([-0.5, 0.0, 0.9])
    assert show_examples(data, 1).splitlines()[-3:] == [
        "--- train example 0: score 0.9",
        "anchor    [CLS] good film [SEP]",
        "positive  [CLS] it is good [SEP]",
    ]


def test_figures_count_each_text(make):
    data = make(max_length=4)
    data.setup("fit")
    assert show_examples(data, 0).splitlines()[1].split() == ["train", "3", "100.0%", "3", "4", "4"]


def test_rows_to_predict_may_be_single_texts(make, write):
    data = make(predict=write("new.json", [{"anchor": "good tea"}]))
    data.setup("predict")
    [batch] = data.predict_dataloader()
    assert (int(batch["sides"]), batch["index"].tolist(), len(batch["input_ids"])) == (1, [0], 1)


def test_scores_outside_the_cosines(make):
    data = make([*ROWS[:2], {**ROWS[2], "near": 4.5}], score="near")
    with pytest.raises(DataError, match=r'row 2 .*column "near": 4.5 is no cosine; .* Divide'):
        data.setup("fit")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"score": "near", "negative": "far"}, r"TextPairs.negative is 'far'; pairs with a score have none"),
        ({"group_by_length": True}, r"TextPairs.group_by_length is True; pairs meet by chance"),
    ],
)
def test_settings_that_exclude_one_another(make, settings, text):
    with pytest.raises(SettingsError, match=text):
        make(**settings)
