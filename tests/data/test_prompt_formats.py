"""Prompts of known layouts."""

from __future__ import annotations

import pytest

from lora_lightning.data import Completions
from lora_lightning.data.prompt_formats import FORMATS, fields
from lora_lightning.errors import DataError, SettingsError

ROWS = [
    {"prompt": "what is the", "completion": "answer"},
    {"prompt": "good tea", "completion": "yes it is"},
    {"prompt": "a", "completion": ""},
    {"prompt": "b", "completion": "no"},
]


START, END = 4, 5


@pytest.fixture
def make(write, causal_tokenizer):
    def make(rows=ROWS, **settings) -> Completions:
        settings = {"tokenizer": causal_tokenizer, "validation_fraction": 0.0, **settings}
        return Completions(train=write("train.json", rows), **settings)

    return make


def columns(data: Completions, split: str = "train") -> tuple[list[list[int]], list[list[int]]]:
    data.setup("fit")
    return data.examples(split)["input_ids"][:], data.examples(split)["labels"][:]


def fails(data: Completions, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.setup("fit")


def test_formats(make, write):
    rows = [
        {"instruction": "what is the", "input": "tea", "output": "good"},
        {"instruction": "what is it", "input": "", "output": "bad"},
    ]
    data = make(rows, format="alpaca", max_length=256)
    data.setup("fit")
    assert (
        FORMATS["alpaca"].fill(rows[0]).endswith("### Instruction:\nwhat is the\n\n### Input:\ntea\n\n### Response:\n")
    )
    assert FORMATS["alpaca"].fill(rows[1]).endswith("request.\n\n### Instruction:\nwhat is it\n\n### Response:\n")
    for row, example in zip(rows, data.examples("train"), strict=True):
        expected = data.tokenizer_object(FORMATS["alpaca"].fill(row))["input_ids"]
        assert example["input_ids"][: len(expected)] == expected
        assert example["labels"][len(expected) :] == example["input_ids"][len(expected) :]
    ids, _ = columns(make([{"instruction": "what is it", "output": "tea"}], format="instruction"))
    assert ids == [[START, 20, 21, 26, 17, END]]  # a table without the optional column
    ids, _ = columns(make([{"question": "is it", "answer": "no"}], format="question", max_length=64))
    assert ids[0][-4:] == [1, 1, 25, END]  # "Answer", ":"


def test_real_formats(shared):
    for name, file in (("alpaca", "commonsense/boolq/train.json"), ("instruction", "gsm8k/test.json")):
        data = Completions(
            train=str(shared / "data" / file),
            format=name,
            tokenizer=str(shared / "models/stories260k"),
            max_length=480,
            limit=8,
        )
        data.setup("fit")
        tokenizer, row = data.tokenizer_object, data.inputs("train")[0]
        text = tokenizer.decode(data.examples("train")["input_ids"][0], skip_special_tokens=True)
        assert text.split() == (FORMATS[name].fill(row) + row["output"]).split()


def test_unknown_and_doubled_formats(make):
    with pytest.raises(
        SettingsError, match=r'^Completions\.format is "alpacca"\. Did you mean "alpaca"\? Formats: alpaca, '
    ):
        make(format="alpacca")
    with pytest.raises(SettingsError, match=r"Completions\.format is 'alpaca'; prompt_template must be null beside it"):
        make(format="alpaca", prompt_template="{instruction}")
    message = (
        r'^Completions\.format "question": column question is "question"; train\.json has the columns prompt, comp'
    )
    fails(make(format="question"), message)


def test_braces_of_json_are_to_be_doubled():
    for template in ('Return {"a": 1} for {q}', "{'a': 1} {q}", "{\n  a: {q}\n}", "{ q }", "{} {q}"):
        with pytest.raises(DataError, match=r"A literal brace is doubled"):
            fields(template)
    assert fields('Return {{"a": 1}} for {q}') == ["q"]
    assert fields("{my question}") == ["my question"]
