from __future__ import annotations

import pytest
import torch

from lora_lightning.data import TaggedWords
from lora_lightning.data.inspect import show_examples
from lora_lightning.errors import DataError

ROWS = [
    {"tokens": ["good", "tea"], "tags": ["O", "B"]},
    {"tokens": ["the", "dog", "is", "bad"], "tags": ["O", "B", "O", "O"]},
    {"tokens": ["cat"], "tags": ["B"]},
]


@pytest.fixture
def make(write, encoder_tokenizer):
    def make(rows=ROWS, **settings) -> TaggedWords:
        settings = {"tokenizer": encoder_tokenizer, "validation_fraction": 0.0, **settings}
        return TaggedWords(train=write("train.json", rows), **settings)

    return make


def test_a_words_first_token_carries_its_tag(make):
    data = make([{"tokens": ["good-tea", "dog"], "tags": ["B", "O"]}])
    data.setup("fit")
    [row] = data.examples("train")
    assert data.label_names == ["B", "O"]
    # [CLS] good - tea dog [SEP]: the tokenizer splits at the hyphen
    assert row["labels"] == [-100, 0, -100, -100, 1, -100]


def test_batches_count_their_words_over_a_window(make):
    data = make(batch_size=2)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == 7
    assert all(int(batch["window_tokens"]) == int((batch["labels"] != -100).sum()) for batch in batches)


def test_words_beyond_the_length_are_cut(make):
    data = make(max_length=4)
    data.setup("fit")
    rows = data.examples("train")
    assert rows["truncated"][:] == [False, True, False]
    assert rows["labels"][1] == [-100, 1, 0, -100]


def test_numbers_and_given_names(make):
    data = make([{"tokens": ["good", "tea"], "tags": [1, 0]}], labels=["NOUN", "ADJ"])
    data.setup("fit")
    assert data.examples("train")["labels"][0] == [-100, 1, 0, -100]
    assert data.num_labels == 2


def test_rows_to_predict_need_no_tags(make, write):
    data = make(predict=write("new.json", [{"tokens": ["good", "tea"]}]))
    data.setup("predict")
    [batch] = data.predict_dataloader()
    assert (batch["labels"] != -100).sum() == 2
    assert torch.equal(batch["index"], torch.tensor([0]))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, 'row 1 .*: 2 words, but column "tags" holds 1 tags'),
        ({"tokens": [], "tags": []}, 'column "tokens" must hold a list of words'),
    ],
)
def test_rows_that_do_not_fit(make, row, text):
    data = make([ROWS[0], row])
    with pytest.raises(DataError, match=text):
        data.setup("fit")


def test_predictions_stand_behind_their_words(make):
    data = make([{"tokens": ["good", "tea", "dog"], "tags": [1, 0, 1]}], labels=["NOUN", "ADJ"])
    row = {**data.inputs("train")[0], "index": 0, "prediction": "NOUN ADJ"}  # the third word was cut off
    shown = data.readable(row)
    assert shown["tagged"] == "good/NOUN tea/ADJ dog/-"
    assert shown["tags"] == ["ADJ", "NOUN", "ADJ"]


def test_inspection_shows_tags(make):
    data = make()
    data.setup("fit")
    assert show_examples(data, 1).endswith("train example 0: 4 tokens\n[CLS] good/O tea/B [SEP]")
