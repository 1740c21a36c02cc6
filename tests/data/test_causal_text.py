"""Settings of packing and streaming, and what a data module tells of them."""

from __future__ import annotations

import json
from itertools import islice
from types import SimpleNamespace

import pytest
from streams import WORDS, numbers, row

from lora_lightning.data import Completions
from lora_lightning.errors import DataError, SettingsError


def test_windows_and_packing(make_stream):
    batches = list(islice(make_stream(window=3, packing=True, max_length=24).train_dataloader(), 9))
    for first in (0, 3, 6):
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches[first : first + 3]]
        assert {int(batch["window_tokens"]) for batch in batches[first : first + 3]} == {sum(counts)}
    for batch in batches:
        assert set(batch) == {"input_ids", "labels", "position_ids", "window_tokens"}
        assert (batch["labels"][batch["position_ids"] == 0] == -100).all()
        assert ((batch["position_ids"] == 0).sum(1) > 1).all()


def test_more_workers_than_files_are_told(make_stream, write, caplog):
    data = make_stream(2, train=write("one.jsonl", json.dumps(row(1))))
    assert data.train_dataloader().workers == 1
    assert "Completions: 1 of 2 workers read the stream, as it has 1 files" in caplog.text


def test_settings_that_a_stream_cannot_have():
    for settings, message in (
        ({"group_by_length": True}, r"streaming is True; group_by_length needs all lengths"),
        ({"shuffle_block": 0}, r"shuffle_block is 0; it must be at least 1"),
        ({"held_out_rows": 0}, r"held_out_rows is 0; it must be at least 1; validation_fraction 0 holds none out"),
    ):
        with pytest.raises(SettingsError, match=rf"^Completions\.{message}"):
            Completions(**{"train": "x.jsonl", "streaming": True, **settings})


def test_a_run_without_an_end(make_stream):
    data = make_stream()
    for change in ({"max_steps": -1}, {"limit_train_batches": 0.5}):
        data.trainer = SimpleNamespace(**{"max_steps": 5, "limit_train_batches": 1.0, **change})
        with pytest.raises(SettingsError, match=r"a stream has no end: set trainer\.max_steps, and leave"):
            data.train_dataloader()


@pytest.mark.parametrize("fraction", [0.0, 0.4])
def test_limit_takes_the_first_rows(make_stream, write, fraction):
    file = write("t.jsonl", "\n".join(json.dumps(row(n)) for n in range(30)))
    whole = make_stream(train=file, validation_fraction=fraction, batch_size=1, shuffle_block=1)
    data = make_stream(train=file, validation_fraction=fraction, batch_size=1, limit=5)
    assert sorted(first_turn(data)) == first_turn(whole)[:5]
    assert not fraction or len(data.examples("validation")) == 5


def first_turn(data, workers: int = 1) -> list[int]:
    """Rows of the first turn, one after the other."""
    rows = []
    for _, batch, position in data.train_dataloader().make({}):
        if position.turn:
            return rows
        rows += numbers(batch)
    raise AssertionError


def test_validation_rows_are_held_out_as_from_a_table(make_stream):
    data = make_stream(validation_fraction=0.4, batch_size=1)
    table = make_stream(validation_fraction=0.4, batch_size=1, streaming=False)
    known = {split: sorted(map(name, table.inputs(split)["prompt"])) for split in ("train", "validation")}
    assert sorted(map(name, data.inputs("validation")["prompt"])) == known["validation"]
    assert sorted(first_turn(data)) == known["train"]
    assert len(known["validation"]) > 9
    few = make_stream(validation_fraction=0.4, batch_size=1, held_out_rows=3)
    assert len(few.examples("validation")) == 3
    assert sorted(first_turn(few)) == known["train"]
    with pytest.raises(
        DataError, match=r"validation_fraction is 1e-09; of the streamed rows it leaves none for validation"
    ):
        make_stream(validation_fraction=1e-9)


def name(prompt: str) -> int:
    return int("".join(str(WORDS.index(word)) for word in prompt.split()))
