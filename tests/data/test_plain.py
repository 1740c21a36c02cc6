from __future__ import annotations

import pytest

from lora_lightning.data import PlainText
from lora_lightning.errors import DataError

START, END = 4, 5


@pytest.fixture
def make(write, causal_tokenizer):
    def make(text="a b c\nd\n\ne f g h\n", **settings) -> PlainText:
        settings = {"tokenizer": causal_tokenizer, "validation_fraction": 0.0, **settings}
        data = PlainText(train=write("train.txt", text), **settings)
        data.setup("fit")
        return data

    return make


def test_blocks_are_full_but_for_the_last(make):
    stream = [START, 6, 7, 8, END, START, 9, END, START, 10, 11, 12, 13, END]
    examples = make(max_length=4).examples("train")
    assert examples["input_ids"][:] == [stream[0:4], stream[4:8], stream[8:12], stream[12:14]]
    assert examples["labels"][:] == examples["input_ids"][:]
    assert examples["index"][:] == [0, 1, 2, 3]
    assert examples["truncated"][:] == [False] * 4


def test_a_last_token_alone_has_nothing_to_predict(make):
    assert [len(ids) for ids in make(max_length=13).examples("train")["input_ids"]] == [13]


def test_blocks_of_one_length(make):
    assert make("a b\nc d\n", max_length=4).examples("train")["input_ids"][:] == [[4, 6, 7, 5], [4, 8, 9, 5]]


def test_blocks_across_many_documents_lose_nothing(make):
    lines = ["a b c d e f g"[: 2 * (n % 7) + 1] for n in range(2500)]
    examples = make("\n".join(lines), max_length=64).examples("train")
    joined = [token for ids in examples["input_ids"] for token in ids]
    assert len(joined) == sum(len(line.split()) + 2 for line in lines)
    assert joined.count(END) == 2500
    assert {len(ids) for ids in examples["input_ids"][:-1]} == {64}


def test_rows_to_predict_stay_rows(make, write):
    """Their predictions are written beside them."""
    data = make(max_length=4, predict=write("more.txt", "a b c\nd\n"))
    data.setup("predict")
    examples = data.examples("predict")
    assert (examples["index"][:], list(map(len, examples["input_ids"]))) == ([0, 1], [4, 3])


def test_rows_are_examples_without_blocks(make):
    data = make(max_length=5, block=False)
    examples = data.examples("train")
    assert examples["input_ids"][:] == [[START, 6, 7, 8, END], [START, 9, END], [START, 10, 11, 12, 13]]
    assert examples["truncated"][:] == [False, False, True]
    batch = next(iter(data._loader("train", 3)))
    assert batch["labels"].tolist()[1] == [START, 9, END, -100, -100]
    assert batch["window_tokens"] == 4 + 2 + 4


def test_empty_rows_are_left_out(make, write, causal_tokenizer):
    source = write("train.json", [{"text": "a"}, {"text": ""}, {"text": "b"}])
    data = PlainText(train=source, tokenizer=causal_tokenizer, block=False, validation_fraction=0.0)
    data.setup("fit")
    assert data.examples("train")["index"][:] == [0, 2]
    assert data.dropped == {"train": 1}


def test_missing_column(write, causal_tokenizer):
    data = PlainText(train=write("train.json", [{"story": "a"}]), tokenizer=causal_tokenizer)
    with pytest.raises(DataError, match=r'^PlainText\.text is "text"; train\.json has the columns story\.$'):
        data.setup("fit")
