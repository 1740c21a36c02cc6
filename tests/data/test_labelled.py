from __future__ import annotations

import pytest
import torch

from lora_lightning.data import LabelledText
from lora_lightning.errors import DataError, SettingsError

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


def test_neither_limit_nor_what_is_held_out_hides_a_class(make):
    rows = [{"text": f"text {n}", "label": "rare" if n == 39 else "common"} for n in range(40)]
    data = make(rows, limit=3, validation_fraction=0.5)
    data.setup("fit")
    assert data.label_names == ["common", "rare"]
    assert len(data.examples("train")) == len(data.examples("validation")) == 3


def test_limit_takes_rows_at_even_steps(make):
    rows = [{"text": f"text {n}", "label": n // 5} for n in range(10)]  # sorted by class
    assert make(rows, limit=4).inputs("train")["text"][:] == ["text 0", "text 2", "text 5", "text 7"]
    assert len(make(rows, limit=99).inputs("train")) == 10


def test_setup_reads_once(make, monkeypatch):
    data = make()
    data.setup("fit")
    first = data.examples("train")
    monkeypatch.setattr(LabelledText, "read", None)
    monkeypatch.setattr(LabelledText, "encode", None)
    data.setup("fit")
    assert data.examples("train") is first


def test_predict_needs_no_labels_and_tells_the_row(make, write):
    data = make(predict=write("new.json", [{"text": "tea"}, {"text": "dog cat"}, {"text": "it"}]), batch_size=2)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == [0, 1, 2]
    assert set(batches[0]) == {"input_ids", "attention_mask", "token_type_ids", "index"}
    assert data.inputs("predict")["text"][:] == ["tea", "dog cat", "it"]


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


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2], r"holds the numbers 1, 2; class numbers must run from 0 to n - 1 without gaps\.$"),
        ([0, 2], r"holds the numbers 0, 2; class numbers must run"),
        ([0.5, 1.0], r"holds 0\.5; classes are whole numbers or strings\. .* set regression: true\.$"),
        (["x", None], r"is missing in row 1, counted from 0\.$"),
    ],
)
def test_labels_that_are_no_classes(make, labels, message):
    rows = [{"text": "a", "label": label} for label in labels]
    fails(make(rows), rf'^LabelledText\.label: train column "label" {message}')


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


def test_missing_sources(make, encoder_tokenizer, write):
    fails(make(), r"^LabelledText\.test is null; name a file, a folder or a hub data set\.$", "test")
    fails(make(), r"^LabelledText\.validation is null", "validate")
    fails(make(), r"^LabelledText\.predict is null", "predict")
    fails(LabelledText(tokenizer=encoder_tokenizer), r"^LabelledText\.train is null")
    data = LabelledText(tokenizer=encoder_tokenizer, test=write("test.json", ROWS))
    fails(data, r"^LabelledText\.labels is null, and so is train, .* list the names in labels\.$", "test")


def test_missing_tokenizer(make):
    fails(make(tokenizer=None), r"^data\.tokenizer is null; set it to the model's path or hub id")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1}, r"LabelledText\.max_length is 1; it must be at least 2 tokens\."),
        ({"batch_size": 0}, r"LabelledText\.batch_size is 0; it must be at least 1\."),
        ({"limit": 0}, r"LabelledText\.limit is 0; it must be at least 1, or null for all examples\."),
        ({"validation_fraction": 1.0}, r"LabelledText\.validation_fraction is 1\.0; it must lie in \[0, 1\)\."),
    ],
)
def test_settings(settings, message):
    with pytest.raises(SettingsError, match=f"^{message}$"):
        LabelledText(**settings)
