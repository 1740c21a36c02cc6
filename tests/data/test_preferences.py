"""Preferences: what the model sees of pairs and of labelled completions, as texts and as turns."""

from __future__ import annotations

import json

import pytest
import torch

from lora_lightning.data import Preferences
from lora_lightning.data.preferences import longest
from lora_lightning.errors import DataError, SettingsError

PAIRS = [
    {"prompt": "tea? ", "chosen": "yes please", "rejected": "no"},
    {"prompt": "milk, too? ", "chosen": "yes", "rejected": "never in my life"},
    {"prompt": "ok? ", "chosen": "ok", "rejected": "ko"},
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]


def turns(role, text):
    return [{"role": role, "content": text}]


CHATS = [{name: turns("user" if name == "prompt" else "assistant", row[name]) for name in row} for row in PAIRS]
IMPLICIT = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CHATS]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def made(write, letters):
    """Data with a tokenizer of one token a letter."""

    def made(rows, split="train", **settings):
        file = write(f"{split}.jsonl", rows if isinstance(rows, str) else lines(rows))
        options = {split: file, "tokenizer": letters(), "validation_fraction": 0.0, "batch_size": 2, "max_length": 64}
        return Preferences(**{**options, **settings})

    return made


def seen(data, split="train"):
    """Of each example, of each of its texts: the prompt and what is learned."""
    data.prepare(split)
    decode = data.tokenizer_object.decode
    found = []
    for example in data.examples(split):
        sides = []
        for ids, labels in zip(example["input_ids"], example["labels"], strict=True):
            first = next(n for n, label in enumerate(labels) if label != -100)
            assert labels[first:] == ids[first:]
            sides.append((decode(ids[:first]), decode(ids[first:])))
        found.append(sides)
    return found


def test_texts(made):
    assert seen(made(PAIRS)) == [
        [(row["prompt"], f"{row['chosen']}</s>"), (row["prompt"], f"{row['rejected']}</s>")] for row in PAIRS
    ]


def rendered(row):
    prompt = f"User:\n{row['prompt']}\nAssistant:\n"
    return [(prompt, f"{row['chosen']}</s>"), (prompt, f"{row['rejected']}</s>")]


@pytest.mark.parametrize("rows", [CHATS, IMPLICIT, [{**row, "prompt": "x"} for row in IMPLICIT]])
def test_turns_apart_and_with_a_prompt_in_both(made, rows):
    assert seen(made(rows, chat_template="plain")) == [rendered(row) for row in PAIRS]


def test_a_system_column_comes_first(made):
    ((chosen, _), *_) = seen(made([{**row, "system": "be kind"} for row in CHATS], chat_template="plain"))
    assert chosen[0].startswith("System:\nbe kind\nUser:\ntea?")


def test_other_columns_are_named_once(made, caplog):
    data = made([{**row, "score_chosen": 1, "score_rejected": 0} for row in PAIRS])
    data.prepare("train")
    data.prepare("validation") if data.sources.validation else None
    assert caplog.text.count("not used: score_chosen, score_rejected") == 1


def test_both_of_a_pair_see_the_same_end_of_a_long_prompt(made):
    data = made([{"prompt": "abcdefgh", "chosen": "x", "rejected": "uvw"}, *PAIRS], max_length=8)
    assert seen(data)[0] == [("efgh", "x</s>"), ("efgh", "uvw</s>")]
    assert data.examples("train")["truncated"][0]


def test_a_long_conversation_loses_its_first_exchanges(made):
    talk = [*turns("user", "first"), *turns("assistant", "one"), *turns("user", "second")]
    data = made(
        [{"prompt": talk, "chosen": turns("assistant", "a"), "rejected": turns("assistant", "bb")}],
        chat_template="plain",
        max_length=32,
    )
    prompt = "User:\nsecond\nAssistant:\n"
    assert seen(data) == [[(prompt, "a</s>"), (prompt, "bb</s>")]]
    assert data.facts()["train"] == {"examples": 1, "truncated": 1, "dropped": 0, "skipped": 0}


def test_what_keeps_nothing_to_learn_is_dropped_and_counted(made, caplog):
    rows = [{**CHATS[0], "prompt": turns("user", "long " * 20)}, *CHATS]
    data = made(rows, chat_template="plain", max_length=48)
    assert len(seen(data)) == 3
    assert data.dropped["train"] == 1
    assert "left 1 of 4 train rows out: that max_length leaves nothing to learn in" in caplog.text
    with pytest.raises(DataError, match=r"Preferences.train: nothing is left of 1 rows: 1 that max_length leaves"):
        made(rows[:1], chat_template="plain", max_length=48).prepare("train")


def test_pairs_side_after_side(made):
    data = made(PAIRS)
    data.prepare("train")
    (batch, rest) = list(data.train_dataloader())
    assert int(batch["sides"]) == 2
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert (len(batch["input_ids"]), len(rest["input_ids"])) == (4, 2)
    assert [int(batch["window_tokens"]), int(rest["window_tokens"])] == [2, 1]
    assert "reference" not in batch


def test_values_that_are_kept_come_with_their_rows_though_the_loader_is_older(made):
    data = made(PAIRS)
    data.prepare("train")
    loader = data.train_dataloader()
    table = torch.arange(6.0).reshape(3, 2)
    data.keep_reference("train", table)
    starts = {tuple(ids[0][:3]): number for number, ids in enumerate(data.examples("train")["input_ids"])}
    found = 0
    for batch in loader:
        half = len(batch["input_ids"]) // 2
        for ids, values in zip(batch["input_ids"][:half].tolist(), batch["reference"], strict=True):
            assert torch.equal(values, table[starts[tuple(ids[:3])]])
            found += 1
    assert found == 3


@pytest.mark.parametrize(("rows", "settings"), [(LABELLED, {"label": "label"}), (PAIRS, {"unpair": True})])
def test_labelled_completions_and_each_behind_another_prompt(made, rows, settings):
    data = made(rows, **settings)
    found = seen(data)
    own, other = [sides[0] for sides in found], [sides[1] for sides in found]
    assert own == [(row["prompt"], f"{row['completion']}</s>") for row in LABELLED]
    assert all(mixed[0] == mine[0] for mixed, mine in zip(other, own, strict=True))
    donors = [next(place for place, mine in enumerate(own) if mine[1] == mixed[1]) for mixed in other]
    assert all(own[donor][0] != own[place][0] for place, donor in enumerate(donors))
    assert data.examples("train")["desirable"][:] == [1, 0] * 3
    (batch, *_) = data.train_dataloader()
    assert batch["desirable"].shape == (2,)
    assert data.task_kinds == ("preference",)
    assert "mismatched" in data.describe(data.examples("train")[0])


def test_rows_to_predict_need_no_label_and_may_be_single(made):
    data = made(PAIRS, "predict", unpair=True)
    assert [len(sides) for sides in seen(data, "predict")] == [2, 2, 2]
    single = made([{k: v for k, v in row.items() if k != "label"} for row in LABELLED], "predict", label="label")
    assert [len(sides) for sides in seen(single, "predict")] == [1] * 6
    (batch, *_) = single.predict_dataloader()
    assert batch["index"].tolist() == [0, 1]
    assert single.readable({"completion": json.dumps(turns("user", "x"))}) == {"completion": turns("user", "x")}


def test_lengths_are_those_of_the_longer_text(made):
    data = made(PAIRS, group_by_length=True)
    data.prepare("train")
    assert longest(data.examples("train")) == [max(map(len, ids)) for ids in data.examples("train")["input_ids"]]
    assert len(list(data.train_dataloader())) == 2


@pytest.mark.parametrize(
    ("rows", "settings", "text"),
    [
        ([*PAIRS, {**PAIRS[0], "rejected": "yes please"}], {}, r"train.jsonl, line 4: .* is the rejected one"),
        ([*PAIRS, {**PAIRS[0], "rejected": None}], {}, r'train.jsonl, line 4: "rejected" is missing'),
        ([{**PAIRS[0], "system": "x"}], {}, r'line 1: .*a value in the column "system", which texts have no place for'),
        ([{**CHATS[0], "images": ["a.png"]}], {}, r'line 1: .*a value in the column "images"'),
        (LABELLED, {}, r'Preferences.chosen is "chosen"; train.jsonl has the columns prompt, completion'),
        (PAIRS, {"label": "label"}, r'Preferences.completion is "completion"; train.jsonl has'),
        ([{**LABELLED[0], "label": "good"}], {"label": "label"}, r"line 1: .* is 'good'; it must be true or false"),
        (
            [{k: v for k, v in LABELLED[0].items() if k != "prompt"}],
            {"label": "label"},
            r'Preferences.prompt is "prompt"; train.jsonl has the columns completion',
        ),
        (PAIRS, {"prompt": "promt"}, r'Preferences.prompt is "promt"; .* Did you mean "prompt"'),
        (
            CHATS,
            {"chat_template": "chatl"},
            r'Preferences.chat_template is "chatl"; no such file. Did you mean "chatml',
        ),
        (CHATS, {}, "Preferences.chat_template is null, and the tokenizer .* has no template"),
    ],
)
def test_rows_and_columns_that_cannot_be_used(made, rows, settings, text):
    with pytest.raises(DataError, match=text):
        made(rows, **settings).prepare("train")


def test_rows_that_cannot_be_used_are_left_out_and_counted(made):
    data = made([*PAIRS, {**PAIRS[0], "rejected": "yes please"}], on_error="skip")
    assert len(seen(data)) == 3
    assert data.facts()["train"]["skipped"] == 1


def test_labels_and_pairs_at_once():
    with pytest.raises(SettingsError, match=r"Preferences.unpair is True; rows with a label are no pairs"):
        Preferences(label="label", unpair=True)
