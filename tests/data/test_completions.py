from __future__ import annotations

import pytest
import torch

from lora_lightning.data import Completions
from lora_lightning.errors import DataError

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


def test_loss_is_on_completion_and_end_token_only(make):
    ids, labels = columns(make())
    assert ids == [[START, 20, 21, 22, 23, END], [START, 14, 17, 24, 26, 21, END], [START, 7, 25, END]]
    assert labels == [
        [-100, -100, -100, -100, 23, END],
        [-100, -100, -100, 24, 26, 21, END],
        [-100, -100, 25, END],
    ]


def test_examples_without_completion_are_dropped_counted_and_said(make, caplog):
    data = make()
    columns(data)
    assert data.dropped == {"train": 1}
    assert data.examples("train")["index"][:] == [0, 1, 3]
    assert "left 1 of 4 train rows out: no completion" in caplog.text


def test_padding_carries_no_loss(make):
    data = make()
    data.setup("fit")
    batch = next(iter(data._loader("train", 3)))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "window_tokens"}
    padding = batch["attention_mask"] == 0
    assert padding.sum() == 4
    assert (batch["labels"][padding] == -100).all()
    assert (batch["input_ids"][padding] == END).all()  # no padding token of its own
    assert batch["window_tokens"] == 2 + 4 + 2


def test_template(make):
    rows = [
        {"instruction": "what is", "input": "the tea", "output": "good"},
        {"instruction": "what is it", "input": None, "output": "good"},
    ]
    ids, _ = columns(make(rows, prompt_template="{instruction} {input} it", completion="output"))
    assert ids == [[START, 20, 21, 22, 17, 26, 14, END], [START, 20, 21, 26, 26, 14, END]]


def test_tokenizer_without_start_token(make, bare_tokenizer):
    ids, _ = columns(make(tokenizer=bare_tokenizer))
    assert ids[0] == [20, 21, 22, 23, END]


def test_truncated_examples_keep_a_completion(make):
    data = make(max_length=3)
    data.setup("fit")
    assert all(len(ids) <= 3 for ids in data.examples("train")["input_ids"])
    assert all(any(label != -100 for label in labels[1:]) for labels in data.examples("train")["labels"])
    assert data.examples("train")["truncated"][:] == [True, True, True]


def test_equal_prompts_stay_on_one_side(make):
    rows = [{"prompt": f"text {n % 30}", "completion": f"answer {n}"} for n in range(120)]
    data = make(rows, validation_fraction=0.3)
    data.setup("fit")
    train, validation = (set(data.inputs(split)["prompt"]) for split in ("train", "validation"))
    assert len(train | validation) == 30
    assert validation
    assert not train & validation


def test_validation_batches_carry_their_own_tokens(make, write):
    data = make(validation=write("dev.json", ROWS), validation_batch_size=1)
    data.setup("fit")
    assert [int(batch["window_tokens"]) for batch in data.val_dataloader()] == [2, 4, 2]


def test_predict_tells_the_row_of_the_input(make, write):
    data = make(predict=write("new.json", ROWS), batch_size=2)
    data.setup("predict")
    index = torch.cat([batch["index"] for batch in data.predict_dataloader()])
    assert [data.inputs("predict")[row]["completion"] for row in index.tolist()] == ["answer", "yes it is", "", "no"]


def test_real_instructions(shared):
    data = Completions(
        train=str(shared / "data/gsm8k/test.json"),
        prompt_template="{instruction}\n{input}",
        completion="output",
        tokenizer=str(shared / "models/stories260k"),
        max_length=96,
        limit=50,
    )
    data.setup("fit")
    tokenizer = data.tokenizer_object
    for row in data.examples("train"):
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        text = tokenizer.decode(learned, skip_special_tokens=True)
        assert data.inputs("train")[row["index"]]["output"].strip().startswith(text.strip()[:40])
        assert row["input_ids"][0] == tokenizer.bos_token_id
        assert len(row["input_ids"]) <= 96


# -- errors ------------------------------------------------------------------------------------------------------------


def fails(data: Completions, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.setup("fit")


def test_missing_columns(make):
    fails(make(prompt="promt"), r'^Completions\.prompt is "promt"; train\.json has .* Did you mean "prompt"\?$')
    fails(
        make(completion="answer"),
        r'^Completions\.completion is "answer"; train\.json has the columns prompt, completion',
    )
    message = r'^Completions\.prompt_template \(.*\): field 2 is "promt"; train\.json has .* Did you mean "prompt"\?$'
    fails(make(prompt_template="{prompt} {promt}"), message)


def test_bad_templates(make):
    fails(
        make(prompt_template="{prompt"), r"prompt_template is '{prompt'; expected '}' .* A literal brace is doubled\.$"
    )
    fails(
        make(prompt_template="{} x"),
        r"prompt_template is '{} x'; each {} must name a column\. A literal brace is doubled\.$",
    )
    fails(make(prompt_template="prompt"), r"prompt_template is 'prompt'; it names no column in {}\.$")


def test_missing_and_empty_text(make):
    fails(
        make([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}]), 'row 1 .*: "prompt" is missing'
    )
    fails(make([{"prompt": "a", "completion": ""}]), r'^train\.json: "completion" is blank in every row\.$')


def test_no_end_token(make, encoder_tokenizer):
    fails(make(tokenizer=encoder_tokenizer), r"has no end-of-text token, which causal-lm data ends examples with\.$")


def test_rows_to_predict_need_no_completion(make, write):
    data = make(predict=write("new.json", [{"prompt": row["prompt"]} for row in ROWS]), batch_size=2)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert sum(len(batch["index"]) for batch in batches) == len(ROWS)
    assert all(bool((batch["labels"] == -100).all()) for batch in batches)


def ids_of(make, rows, **settings) -> list[list[int]]:
    data = make(rows, **settings)
    data.setup("fit")
    return data.examples("train")["labels"][:]


def test_zero_and_false_are_answers(make, shared):
    tokenizer = str(shared / "models/stories260k")
    data = make([{"prompt": "is 2 odd", "completion": value} for value in (0, False, 1, 0.0)], tokenizer=tokenizer)
    data.setup("fit")
    learned = [[token for token in labels if token != -100][:-1] for labels in data.examples("train")["labels"]]
    assert [data.tokenizer_object.decode(ids).strip() for ids in learned] == ["0", "false", "1", "0.0"]


def test_an_answer_that_is_an_object_is_learned_as_json(make, shared):
    data = make([{"prompt": "x", "completion": {"a": 1, "b": None}}], tokenizer=str(shared / "models/stories260k"))
    assert data.read("train")["completion"][:] == ['{"a": 1, "b": null}']


def test_conversations_are_refused_by_name(make):
    turns = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]}
    with pytest.raises(DataError, match=r'^train\.json, row 1 .*: "prompt" is a list of turns; Chat learns those'):
        ids_of(make, [ROWS[0], turns])


@pytest.mark.parametrize("column", ["system", "history", "images", "tools"])
def test_columns_that_would_change_what_is_learned(make, column):
    rows = [{**ROWS[0], column: "x"}]
    with pytest.raises(
        DataError, match=rf'row 0 .*: Completions has a value in the column "{column}", .* prompt_template, or set'
    ):
        ids_of(make, rows)
    assert ids_of(make, rows, prompt_template=f"{{{column}}} {{prompt}}")
