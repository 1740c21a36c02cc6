"""Streams: each row once a turn across ranks and workers, what is left out, and refusals."""

from __future__ import annotations

import json
from itertools import islice

import datasets
import pytest
from streams import COUNT, numbers, plain, row
from torch.utils.data import DataLoader
from toy_runs import decoder_folder

from lora_lightning.cli.main import main
from lora_lightning.data import Chat, PlainText
from lora_lightning.data.batches.streaming import StreamBatches
from lora_lightning.errors import DataError

SOME = [(0, 1), (0, 3), (1, 1), (2, 2)]
EVERY = [(workers, ranks) for workers in (0, 1, 2) for ranks in (1, 2, 3) if (workers, ranks) not in SOME]


@pytest.mark.parametrize(("workers", "ranks"), [*SOME, *(pytest.param(*c, marks=pytest.mark.slow) for c in EVERY)])
def test_each_row_comes_once_a_turn_whoever_reads_it(make_stream, workers, ranks):
    seen = []
    for rank in range(ranks):
        loader = make_stream(workers, (ranks, rank), batch_size=1).train_dataloader()
        parts: dict[int, list[int]] = {worker: [] for worker in range(max(1, loader.workers))}
        done: set[int] = set()
        for worker, batch, position in DataLoader(loader.make({}), batch_size=None, num_workers=loader.workers):
            if position.turn:
                done.add(worker)
            if len(done) == len(parts):
                break
            parts[worker] += numbers(batch) if not position.turn else []
        seen += [number for part in parts.values() for number in part]
    assert sorted(seen) == list(range(COUNT))


def test_a_turn_is_shuffled_and_another_one_otherwise(make_stream):
    rows = [n for batch in islice(make_stream(batch_size=1).train_dataloader(), 2 * COUNT) for n in numbers(batch)]
    assert sorted(rows[:COUNT]) == sorted(rows[COUNT:]) == list(range(COUNT))
    assert rows[:COUNT] != list(range(COUNT))
    assert rows[:COUNT] != rows[COUNT:]
    other = [n for batch in islice(make_stream(batch_size=1, seed=1).train_dataloader(), COUNT) for n in numbers(batch)]
    assert other != rows[:COUNT]


def test_what_has_nothing_to_learn_is_left_out(make_stream, write):
    lines = [{"prompt": "a b c", "completion": ""}, {"prompt": "a b d", "completion": "yes"}]
    data = make_stream(train=write("t.jsonl", "\n".join(map(json.dumps, lines))), batch_size=1)
    assert [numbers(batch) for batch in islice(data.train_dataloader(), 3)] == [[13], [13], [13]]
    empty = make_stream(train=write("e.jsonl", json.dumps(lines[0])), batch_size=1)
    with pytest.raises(DataError, match="a stream holds no example that has anything to learn"):
        next(iter(empty.train_dataloader()))


def test_weights(make_stream, write):
    files = {}
    for name, weight, first in (("x.jsonl", 3.0, 0), ("y.jsonl", 1.0, 500)):
        lines = "\n".join(json.dumps(row(n)) for n in range(first, first + 400))
        files[write(name, lines)] = weight
    rows = [
        n for batch in islice(make_stream(train=files, batch_size=1).train_dataloader(), 400) for n in numbers(batch)
    ]
    fraction = sum(n < 500 for n in rows) / len(rows)
    assert abs(fraction - 0.75) < 3 * (0.75 * 0.25 / len(rows)) ** 0.5
    loader = make_stream(train=files, batch_size=1).train_dataloader()
    batches = iter(loader)
    assert [n for batch in islice(batches, 123) for n in numbers(batch)] == rows[:123]
    resumed = make_stream(train=files, batch_size=1).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert [n for batch in islice(resumed, 200) for n in numbers(batch)] == rows[123:323]


def test_other_kinds_of_data(write, causal_tokenizer):
    common = {"tokenizer": causal_tokenizer, "streaming": True, "validation_fraction": 0.0, "batch_size": 2}
    text = PlainText(train=write("t.txt", "a b\n\nc d e\n"), block=False, **common)
    turns = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "tea"}]
    chat = Chat(train=write("c.json", [{"messages": turns}] * 2), chat_template="plain", **common)
    for data in (text, chat):
        data.setup("fit")
    batch = next(iter(text.train_dataloader()))
    assert sorted(batch["input_ids"].tolist()) == [[4, 6, 7, 5, 5], [4, 8, 9, 10, 5]]
    assert batch["window_tokens"] == 3 + 4
    learned = next(iter(chat.train_dataloader()))["labels"]
    assert [[label for label in labels if label != -100] for labels in learned.tolist()] == [[17, 5]] * 2


# -- what is held out, limited, skipped, cut ---------------------------------------------------------------------------


SLOW = [pytest.param(kind, 2, marks=pytest.mark.slow) for kind in ("csv", "txt")]
BAD = {
    "jsonl": [*(json.dumps(row(n)) for n in range(9)), "{", "[1]", json.dumps(row(9)), b"\xff", json.dumps(row(10))],
    "csv": ["prompt,completion", "a b c,yes", "a,b,c", "a b d,yes", b"\xff,yes", '"a b e","it,', 'is"', "a b f,no"],
    "txt": ["a b c", "", b"\xff", "a b d"],
}


@pytest.mark.parametrize(("kind", "workers"), [("jsonl", 0), ("csv", 0), ("txt", 0), ("jsonl", 2), *SLOW])
def test_lines_that_cannot_be_read_are_skipped_and_counted(make_stream, tmp_path, kind, workers):
    """The same rows as of a table; the count goes on in a resumed run, and counts each line once."""
    lines = [line if isinstance(line, bytes) else line.encode() for line in BAD[kind]]
    folder = tmp_path / "bad"
    folder.mkdir()
    for part in range(2):
        (folder / f"train-{part}.{kind}").write_bytes(b"\n".join(lines) + b"\n")
    settings = {"on_error": "skip", "batch_size": 1, "max_length": 32}
    settings |= {"kind": PlainText, "block": False} if kind == "txt" else {}
    data = make_stream(workers, train=str(folder), **settings)
    one = folder / f"train-0.{kind}"
    table = make_stream(train=str(one), streaming=False, **settings)
    skipped = {"jsonl": 3, "csv": 2, "txt": 1}[kind]
    ids = sorted(table.examples("train")["input_ids"])
    assert table.facts()["train"] == {"examples": len(ids), "truncated": 0, "dropped": 0, "skipped": skipped}
    loader = data.train_dataloader()
    batches, seen = iter(loader), 0
    while loader.counts()["examples"] < 2 * len(ids):
        next(batches)
        seen += 1
        if seen == 3:  # stopped and resumed
            state, loader = loader.state_dict(), data.train_dataloader()
            loader.load_state_dict(state)
            batches = iter(loader)
    next(batches), next(batches), next(batches)
    found = data.facts()["train"]
    assert found == {"examples": 2 * len(ids), "truncated": 0, "dropped": 0, "skipped": 2 * skipped}
    got = [
        batch["input_ids"][0].tolist()
        for batch in islice(make_stream(train=str(one), **settings).train_dataloader(), len(ids))
    ]
    assert sorted(got) == ids


def test_what_cannot_be_skipped_in(make_stream, write, tmp_path):
    datasets.Dataset.from_list([row(1)]).to_parquet(str(tmp_path / "c.parquet"))
    for file in (str(tmp_path / "c.parquet"), "owner/name"):
        with pytest.raises(DataError, match=r"by line(; \"c\.parquet\" is none)?\. Set data\.on_error to raise"):
            make_stream(train=file, on_error="skip")
    empty = tmp_path / "none.jsonl"
    empty.write_text("{\n")
    with pytest.raises(DataError, match="it holds no examples"):
        make_stream(train=str(empty), on_error="skip")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_documents_in_full_chunks(make_stream, workers):
    """The tokens of whole documents laid end to end, over turns; each chunk full; resumed inside a document."""
    settings = {"kind": PlainText, "text": "prompt", "batch_size": 1}
    ends = make_stream(**settings, block=False, max_length=99).train_dataloader()
    tokens = [token for batch in islice(ends, 100) for token in batch["input_ids"][0].tolist()]
    chunks = [
        batch["input_ids"][0].tolist() for batch in islice(make_stream(**settings, max_length=7).train_dataloader(), 60)
    ]
    assert [token for chunk in chunks for token in chunk] == tokens[: 60 * 7]
    assert {len(chunk) for chunk in chunks} == {7}
    whole = plain(islice(make_stream(workers, **settings, max_length=3).train_dataloader(), 40))
    assert all(batch["labels"] == batch["input_ids"] for batch in whole)
    for stop in (1, 2, 7, 16, 29) if workers == 0 else (2, 16):
        stopped = make_stream(workers, **settings, max_length=3).train_dataloader()
        assert plain(islice(stopped, stop)) == whole[:stop]
        resumed = make_stream(workers, **settings, max_length=3).train_dataloader()
        resumed.load_state_dict(stopped.state_dict())
        assert plain(islice(resumed, 11)) == whole[stop : stop + 11]


def test_a_run_tells_what_was_left_out(tmp_path, monkeypatch, capsys):
    decoder = decoder_folder(tmp_path / "decoder")
    rows = [json.dumps({"prompt": f"w{n} w1", "completion": f"w{n} w2" if n % 5 else ""}) for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:4], "{", *rows[4:]]) + "\n")
    monkeypatch.chdir(tmp_path)
    words = [f"--model.pretrained={decoder}", "--model.task=causal-lm", "--model.method=LoRA", "--data=Completions"]
    words += ["--data.train=rows.jsonl", "--data.streaming=true", "--data.on_error=skip", "--data.batch_size=2"]
    words += ["--data.validation_fraction=0.3", "--trainer.max_steps=12", "--trainer.val_check_interval=6"]
    words += [
        "--trainer.check_val_every_n_epoch=null",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    assert main(["fit", *words]) == 0
    counts = json.loads((tmp_path / "runs/run/001/summary.json").read_text())["data"]
    held = counts["validation"]["examples"] + counts["validation"]["dropped"]
    assert counts["train"]["examples"] + counts["train"]["dropped"] + held == 10
    assert counts["train"]["skipped"] == 1
    assert counts["train"]["dropped"] + counts["validation"]["dropped"] == 2
    assert "data        1 train rows were left out" in capsys.readouterr().out


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_rows_that_cannot_be_used(make_stream, write, stream_folder):
    with pytest.raises(DataError, match=r'^Completions\.prompt is "promt"; many has the columns prompt, completion'):
        make_stream(prompt="promt")
    with pytest.raises(DataError, match=r'^Completions\.train is ".*nothing\.jsonl"; no such file'):
        make_stream(train="nothing.jsonl")
    gap = make_stream(train=write("g.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": null, "completion": "b"}'))
    with pytest.raises(DataError, match=r'^g\.jsonl, line 2: "prompt" is missing'):
        list(islice(gap.train_dataloader(), 3))
    good = "\n".join(json.dumps(row(n)) for n in range(5))
    with pytest.raises(DataError, match=r"b\.jsonl\"; line 6 cannot be read: Expecting value"):
        make_stream(train=write("b.jsonl", f"{good}\n" + '{"prompt": '))
    with pytest.raises(DataError, match=r"streaming is True, so that nobody knows the training examples beforehand"):
        make_stream().examples("train")
    bad = make_stream(train=str(stream_folder))
    (stream_folder / "train-2.jsonl").write_text(f"{good}\n[1]\n")
    with pytest.raises(DataError, match=r"^train-2\.jsonl, line 6: a list, not"):
        list(islice(bad.train_dataloader(), 30))
    with pytest.raises(DataError, match=r'many"; train-2\.jsonl, line 6 cannot be read: a list, not'):
        make_stream(train=str(stream_folder))


@pytest.mark.parametrize("fill", ["examples", "packs", "chunks"])
def test_rows_that_give_several_examples(fill):
    """Each comes once a turn, and reading goes on between two examples of a row."""

    def thrice(batch, numbers):
        value = batch["value"][0]
        return {"input_ids": [[10 * value + part] * 3 for part in range(value % 3 + 1)]}

    def batches(positions):
        stream = datasets.Dataset.from_list([{"value": value} for value in range(5)]).to_iterable_dataset()
        collate = lambda examples: [list(example["input_ids"]) for example in examples]  # noqa: E731
        return iter(StreamBatches(stream, thrice, collate, 1, 7, fill, 2, seed=0, positions=positions))

    whole = list(islice(batches({}), 30))
    found = [token for _, [tokens], _ in whole for token in tokens][::3]
    assert sorted(found[:9]) == [0, 10, 11, 20, 21, 22, 30, 40, 41]
    assert any(position.part for _, _, position in whole)
    for stop, (_, _, position) in enumerate(whole[:12], start=1):
        again = list(islice(batches({0: position}), 10))
        assert [made for _, made, _ in again] == [made for _, made, _ in whole[stop : stop + 10]]
