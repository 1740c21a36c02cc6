from __future__ import annotations

import pytest
import torch

from lora_lightning.data import LabelledText
from lora_lightning.errors import DataError

ROWS = [
    {"text": "good film", "label": "positive"},
    {"text": "a bad film", "label": "negative"},
    {"text": "what is the answer", "label": "positive"},
]


@pytest.fixture
def make(write, encoder_tokenizer):
    def make(rows=ROWS, **settings) -> LabelledText:
        settings = {"tokenizer": encoder_tokenizer, "validation_fraction": 0.0, **settings}
        return LabelledText(train=write("train.json", rows), **settings)

    return make


def in_order(data: LabelledText) -> dict[str, torch.Tensor]:
    data.setup("fit")
    return next(iter(data._loader("train", 16)))


def test_batch(make):
    batch = in_order(make())
    assert batch["input_ids"].tolist() == [
        [2, 14, 16, 3, 0, 0],
        [2, 6, 15, 16, 3, 0],
        [2, 20, 21, 22, 23, 3],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [4, 5, 6]
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [1, 0, 1]


def test_pairs(make):
    rows = [{"text": "a b", "other": "c", "label": 0}, {"text": "d", "other": "e f", "label": 1}]
    batch = in_order(make(rows, text_pair="other"))
    assert batch["input_ids"].tolist() == [[2, 6, 7, 3, 8, 3], [2, 9, 3, 10, 11, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]


def test_truncation_is_noted(make):
    data = make(max_length=5)
    data.setup("fit")
    assert [len(ids) for ids in data.examples("train")["input_ids"]] == [4, 5, 5]
    assert data.examples("train")["truncated"][:] == [False, False, True]


def test_string_labels_are_sorted(make):
    data = make()
    assert (data.num_labels, data.label_names) == (2, ["negative", "positive"])


def test_class_numbers_are_kept(make):
    data = make([{"text": "a", "label": 2}, {"text": "b", "label": 0}, {"text": "c", "label": 1}])
    assert in_order(data)["labels"].tolist() == [2, 0, 1]
    assert (data.num_labels, data.label_names) == (3, ["0", "1", "2"])


def test_given_names_serve_strings_and_numbers(make):
    by_name = make(labels=["positive", "negative", "neutral"])
    assert in_order(by_name)["labels"].tolist() == [0, 1, 0]
    assert by_name.num_labels == 3
    by_number = make([{"text": "a", "label": 1}], labels=["no", "yes"])
    assert in_order(by_number)["labels"].tolist() == [1]
    assert by_number.label_names == ["no", "yes"]


def test_class_names_of_a_data_set(tmp_path, encoder_tokenizer):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y", "z"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=features)
    rows.save_to_disk(tmp_path / "set")
    data = LabelledText(train=str(tmp_path / "set"), tokenizer=encoder_tokenizer, validation_fraction=0.0)
    assert in_order(data)["labels"].tolist() == [2, 0]
    assert data.label_names == ["x", "y", "z"]


def test_regression(make):
    data = make([{"text": "a", "label": 1}, {"text": "b", "label": 2.5}], regression=True)
    batch = in_order(data)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [1.0, 2.5]
    assert (data.num_labels, data.label_names) == (1, [])


# -- errors ------------------------------------------------------------------------------------------------------------


def fails(data: LabelledText, message: str, stage: str = "fit") -> None:
    with pytest.raises(DataError, match=message) as error:
        data.setup(stage)
    assert "\n" not in str(error.value)


def test_unknown_label(make, write):
    rows = [{"text": "a", "label": "positive"}, {"text": "b", "label": "postive"}]
    message = (
        r'^LabelledText\.label: validation column "label", row 1 \(counted from 0\): \'postive\' is not a known label\.'
        r' Did you mean "positive"\? Known: negative, positive\.$'
    )
    fails(make(validation=write("dev.json", rows)), message)
    fails(
        make(labels=["positive"]), r"train column .*, row 1 .* 'negative' is not a known label\..* Known: positive\.$"
    )


def test_number_is_no_known_label_where_strings_were_learned(make, write):
    fails(make(validation=write("dev.json", [{"text": "a", "label": 1}])), "row 0 .* 1 is not a known label")


def test_regression_wants_numbers(make):
    rows = [{"text": "a", "label": "high"}]
    fails(make(rows, regression=True), r"train column \"label\", row 0 \(counted from 0\): 'high' is not a number\.$")


def test_missing_columns(make):
    fails(
        make(text="txet"),
        r'^LabelledText\.text is "txet"; train\.json has the columns text, label\. Did you mean "text"',
    )
    fails(make(text_pair="other"), r'^LabelledText\.text_pair is "other"; train\.json has')
    fails(make(label="labels"), r'^LabelledText\.label is "labels"; train\.json has .* Did you mean "label"\?$')
