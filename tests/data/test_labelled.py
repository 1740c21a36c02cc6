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
        r'^dev\.json, row 1 \(counted from 0\): LabelledText\.label, column "label": \'postive\' is not a known label\.'
        r' Did you mean "positive"\? Known: negative, positive\. data\.on_error: skip leaves such rows out\.$'
    )
    fails(make(validation=write("dev.json", rows)), message)
    fails(
        make(labels=["positive"]), r"^train\.json, row 1 .* 'negative' is not a known label\..* Known: positive\. data"
    )


def test_number_is_no_known_label_where_strings_were_learned(make, write):
    fails(make(validation=write("dev.json", [{"text": "a", "label": 1}])), "row 0 .* 1 is not a known label")


def test_regression_wants_numbers(make):
    rows = [{"text": "a", "label": "high"}]
    fails(make(rows, regression=True), r"^train\.json, row 0 \(counted from 0\): .*'high' is not a number\. data")


def test_missing_columns(make):
    fails(
        make(text="txet"),
        r'^LabelledText\.text is "txet"; train\.json has the columns text, label\. Did you mean "text"',
    )
    fails(make(text_pair="other"), r'^LabelledText\.text_pair is "other"; train\.json has')
    fails(make(label="labels"), r'^LabelledText\.label is "labels"; train\.json has .* Did you mean "label"\?$')


# -- labels as people write them ---------------------------------------------------------------------------------------


def read_csv(write, tokenizer, text: str, **settings) -> LabelledText:
    settings = {"tokenizer": tokenizer, "validation_fraction": 0.0, **settings}
    return LabelledText(train=write("train.csv", text), **settings)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,no\nb,yes\nc,\n", r"^train\.csv, line 4: .*the label is '', which is empty\. data\.on_error: skip"),
        ('a,no\n"b\nb",yes\nc\n', r"^train\.csv, line 5: .*the label is missing\."),  # too few fields
        ("a,no\nb,  \n", r"^train\.csv, line 3: .*the label is '  ', which is empty"),
    ],
)
def test_a_label_that_is_empty_is_an_error_with_its_line(write, encoder_tokenizer, rows, message):
    fails(read_csv(write, encoder_tokenizer, f"text,label\n{rows}"), message)


def test_a_blank_number_is_named_with_its_own_line(write, encoder_tokenizer):
    """Not with the first row, whose text the reader had made of a number."""
    data = read_csv(write, encoder_tokenizer, "text,label\na,0.0\nb,1.5\nc,\n", regression=True)
    fails(data, r"^train\.csv, line 4: LabelledText\.label, column \"label\": the label is '', which is empty")


def test_labels_that_cannot_be_used_are_left_out_and_counted_by_kind(write, encoder_tokenizer, caplog):
    text = "text,label\na,no\nb,\nc,yes\nd,maybe\ne,\nf,no\n"
    data = read_csv(write, encoder_tokenizer, text, labels=["no", "yes"], on_error="skip")
    assert in_order(data)["labels"].tolist() == [0, 1, 0]
    told = data.sources.faults.told("train")
    assert told == "2 without a label (first: train.csv, line 3), 1 with an unknown label (first: train.csv, line 5)"
    assert data.facts()["train"]["skipped"] == 3
    data.setup("fit")
    assert caplog.text.count(f"LabelledText: rows of train were left out: {told}") == 1
    assert data.inputs("train").column_names == ["text", "label"]


def test_numbers_from_one_are_the_names_that_are_listed(write, encoder_tokenizer):
    data = read_csv(write, encoder_tokenizer, "text,label\na,1\nb,2\nc,1\nd,3\n", labels=["1", "2", "3"])
    assert in_order(data)["labels"].tolist() == [0, 1, 0, 2]
    swapped = read_csv(write, encoder_tokenizer, "text,label\na,1\nb,0\n", labels=["1", "0"])
    assert in_order(swapped)["labels"].tolist() == [0, 1]
    by_data = read_csv(write, encoder_tokenizer, "text,label\na,5\nb,1\nc,3\n")
    assert (in_order(by_data)["labels"].tolist(), by_data.label_names) == ([2, 0, 1], ["1", "3", "5"])


def test_a_text_in_one_file_and_a_number_in_another_are_one_label(make, write):
    dev = write("dev.json", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    data = make([{"text": "a", "label": "1"}, {"text": "b", "label": "0"}], validation=dev)
    data.setup("fit")
    assert data.examples("validation")["labels"][:] == [0, 1]


def test_declared_names_stay_with_their_rows_where_names_are_listed_in_another_order(tmp_path, encoder_tokenizer):
    import datasets

    names = datasets.ClassLabel(names=["2", "1"])  # class number 0 is called "2"
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).save_to_disk(tmp_path / "set")
    settings = {"train": str(tmp_path / "set"), "tokenizer": encoder_tokenizer, "validation_fraction": 0.0}
    assert in_order(LabelledText(**settings))["labels"].tolist() == [0, 1]
    assert in_order(LabelledText(**settings, labels=["1", "2"]))["labels"].tolist() == [1, 0]
    features["label"] = datasets.ClassLabel(names=["no", "yes"])
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}, features=features)
    rows.save_to_disk(tmp_path / "unlabelled")
    fails(LabelledText(**{**settings, "train": str(tmp_path / "unlabelled")}), "row 1 .*: the label is missing")


def test_classes_and_their_counts_are_printed_before_training(write, encoder_tokenizer, capsys):
    data = read_csv(write, encoder_tokenizer, "text,label\na,Yes\nb,yes \nc,no\nd,Yes\n")
    data.setup("fit")
    assert capsys.readouterr().out == (
        "classes     Yes 2, no 1, 'yes ' 1 ('Yes' and 'yes ' differ in blanks and case alone: are they one class?)\n"
    )
