"""Streams: each row once a turn across ranks and workers, exact resume anywhere, and refusals."""

from __future__ import annotations

import io
import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from toy_runs import decoder_folder

from lora_lightning.cli.main import main
from lora_lightning.data import Chat, Completions, PlainText
from lora_lightning.errors import DataError, ResumeError, SettingsError

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "good", "bad"]
SIZES = (13, 7, 10, 11)
COUNT = sum(SIZES)


def row(number: int) -> dict[str, str]:
    prompt = " ".join(WORDS[int(digit)] for digit in f"{number:03d}")
    return {"prompt": prompt, "completion": "yes it is the answer"[: 3 + 3 * (number % 5)]}


@pytest.fixture
def folder(tmp_path):
    """Four files of unequal length."""
    made, number = tmp_path / "many", 0
    made.mkdir()
    for file, size in enumerate(SIZES):
        lines = [json.dumps(row(n)) for n in range(number, number + size)]
        (made / f"train-{file}.jsonl").write_text("\n".join(lines) + "\n")
        number += size
    return made


@pytest.fixture
def make(folder, causal_tokenizer):
    def make(workers: int = 0, ranks: tuple[int, int] = (1, 0), window: int = 1, kind=Completions, **settings):
        settings = {"train": str(folder), "batch_size": 2, "shuffle_block": 4, "max_length": 16, **settings}
        common = {"tokenizer": causal_tokenizer, "validation_fraction": 0.0, "num_workers": workers, "streaming": True}
        data = kind(**{**common, **settings})
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs={"num_replicas": ranks[0], "rank": ranks[1]},
            accumulate_grad_batches=window,
            limit_train_batches=1.0,
            max_steps=100,
        )
        data.setup("fit")
        return data

    return make


def numbers(batch) -> list[int]:
    """The rows of a batch, from the three words that tell their number."""
    return [int("".join(str(token - 6) for token in ids[1:4])) for ids in batch["input_ids"].tolist()]


def plain(batches) -> list[dict]:
    return [{name: value.tolist() for name, value in batch.items()} for batch in batches]


SOME = [(0, 1), (0, 3), (1, 1), (2, 2)]
EVERY = [(workers, ranks) for workers in (0, 1, 2) for ranks in (1, 2, 3) if (workers, ranks) not in SOME]


@pytest.mark.parametrize(("workers", "ranks"), [*SOME, *(pytest.param(*c, marks=pytest.mark.slow) for c in EVERY)])
def test_each_row_comes_once_a_turn_whoever_reads_it(make, workers, ranks):
    seen = []
    for rank in range(ranks):
        loader = make(workers, (ranks, rank), batch_size=1).train_dataloader()
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


@pytest.mark.parametrize(
    ("workers", "window", "packing"),
    [
        (0, 1, False),
        (2, 3, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(0, 1, True), (0, 3, False), (0, 3, True), (1, 2, False), (1, 2, True), (2, 3, False)]
        ),
    ],
)
def test_resume_goes_on_as_if_never_stopped(make, workers, window, packing):
    """Over blocks, files and turns, and inside windows; the positions survive torch.save without pickled objects."""
    settings = {"packing": packing, "max_length": 20}
    whole = plain(islice(make(workers, window=window, **settings).train_dataloader(), 60))
    for stop in (1, 2, 5, 9, 21, 31, 45) if workers == 0 else (4, 23):
        stopped = make(workers, window=window, **settings).train_dataloader()
        batches = iter(stopped)
        assert plain(islice(batches, stop)) == whole[:stop]
        file = io.BytesIO()
        torch.save(stopped.state_dict(), file)
        file.seek(0)
        resumed = make(workers, window=window, **settings).train_dataloader()
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert plain(islice(resumed, 12)) == whole[stop : stop + 12]


def _one_process(rank: int, folder: str, make, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    whole = plain(islice(make(0, (2, rank)).train_dataloader(), 30))
    stopped, resumed = (make(0, (2, rank)).train_dataloader() for _ in range(2))
    assert plain(islice(stopped, 17)) == whole[:17]
    written = [stopped.state_dict()]
    torch.distributed.broadcast_object_list(written, src=0)  # what the first process wrote is what all of them read
    resumed.load_state_dict(written[0])
    results.put((rank, plain(islice(resumed, 13)) == whole[17:]))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_each_process_goes_on_where_it_was(make, tmp_path):
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_one_process, args=(rank, str(tmp_path), make, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        assert sorted(results.get(timeout=60) for _ in processes) == [(0, True), (1, True)]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def test_a_turn_is_shuffled_and_another_one_otherwise(make):
    rows = [n for batch in islice(make(batch_size=1).train_dataloader(), 2 * COUNT) for n in numbers(batch)]
    assert sorted(rows[:COUNT]) == sorted(rows[COUNT:]) == list(range(COUNT))
    assert rows[:COUNT] != list(range(COUNT))
    assert rows[:COUNT] != rows[COUNT:]
    other = [n for batch in islice(make(batch_size=1, seed=1).train_dataloader(), COUNT) for n in numbers(batch)]
    assert other != rows[:COUNT]


def test_windows_and_packing(make):
    batches = list(islice(make(window=3, packing=True, max_length=24).train_dataloader(), 9))
    for first in (0, 3, 6):
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches[first : first + 3]]
        assert {int(batch["window_tokens"]) for batch in batches[first : first + 3]} == {sum(counts)}
    for batch in batches:
        assert set(batch) == {"input_ids", "labels", "position_ids", "window_tokens"}
        assert (batch["labels"][batch["position_ids"] == 0] == -100).all()
        assert ((batch["position_ids"] == 0).sum(1) > 1).all()


def test_what_has_nothing_to_learn_is_left_out(make, write):
    lines = [{"prompt": "a b c", "completion": ""}, {"prompt": "a b d", "completion": "yes"}]
    data = make(train=write("t.jsonl", "\n".join(map(json.dumps, lines))), batch_size=1)
    assert [numbers(batch) for batch in islice(data.train_dataloader(), 3)] == [[13], [13], [13]]
    empty = make(train=write("e.jsonl", json.dumps(lines[0])), batch_size=1)
    with pytest.raises(DataError, match="a stream holds no example that has anything to learn"):
        next(iter(empty.train_dataloader()))


def test_weights(make, write):
    files = {}
    for name, weight, first in (("x.jsonl", 3.0, 0), ("y.jsonl", 1.0, 500)):
        lines = "\n".join(json.dumps(row(n)) for n in range(first, first + 400))
        files[write(name, lines)] = weight
    rows = [n for batch in islice(make(train=files, batch_size=1).train_dataloader(), 400) for n in numbers(batch)]
    share = sum(n < 500 for n in rows) / len(rows)
    assert abs(share - 0.75) < 3 * (0.75 * 0.25 / len(rows)) ** 0.5
    loader = make(train=files, batch_size=1).train_dataloader()
    batches = iter(loader)
    assert [n for batch in islice(batches, 123) for n in numbers(batch)] == rows[:123]
    resumed = make(train=files, batch_size=1).train_dataloader()
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


def test_more_workers_than_files_are_told(make, write, caplog):
    data = make(2, train=write("one.jsonl", json.dumps(row(1))))
    assert data.train_dataloader().workers == 1
    assert "Completions: 1 of 2 workers read the stream, as it has 1 files" in caplog.text


# -- what is held out, limited, skipped, cut ---------------------------------------------------------------------------


def first_turn(data, workers: int = 1) -> list[int]:
    """Rows of the first turn, one after the other."""
    rows = []
    for _, batch, position in data.train_dataloader().make({}):
        if position.turn:
            return rows
        rows += numbers(batch)
    raise AssertionError


def test_validation_rows_are_held_out_as_from_a_table(make):
    data = make(validation_fraction=0.4, batch_size=1)
    table = make(validation_fraction=0.4, batch_size=1, streaming=False)
    known = {split: sorted(map(name, table.inputs(split)["prompt"])) for split in ("train", "validation")}
    assert sorted(map(name, data.inputs("validation")["prompt"])) == known["validation"]
    assert sorted(first_turn(data)) == known["train"]
    assert len(known["validation"]) > 9
    few = make(validation_fraction=0.4, batch_size=1, held_out_rows=3)
    assert len(few.examples("validation")) == 3
    assert sorted(first_turn(few)) == known["train"]
    with pytest.raises(
        DataError, match=r"validation_fraction is 1e-09; of the streamed rows it leaves none for validation"
    ):
        make(validation_fraction=1e-9)


def name(prompt: str) -> int:
    return int("".join(str(WORDS.index(word)) for word in prompt.split()))


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_limit_takes_the_first_rows(make, write, share):
    file = write("t.jsonl", "\n".join(json.dumps(row(n)) for n in range(30)))
    whole = make(train=file, validation_fraction=share, batch_size=1, shuffle_block=1)
    data = make(train=file, validation_fraction=share, batch_size=1, limit=5)
    assert sorted(first_turn(data)) == first_turn(whole)[:5]
    assert not share or len(data.examples("validation")) == 5


BAD = {
    "jsonl": [*(json.dumps(row(n)) for n in range(9)), "{", "[1]", json.dumps(row(9)), b"\xff", json.dumps(row(10))],
    "csv": ["prompt,completion", "a b c,yes", "a,b,c", "a b d,yes", b"\xff,yes", '"a b e","it,', 'is"', "a b f,no"],
    "txt": ["a b c", "", b"\xff", "a b d"],
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("workers", [0, 2])
def test_lines_that_cannot_be_read_are_skipped_and_counted(make, tmp_path, kind, workers):
    """The same rows as of a table; the count goes on in a resumed run, and counts each line once."""
    lines = [line if isinstance(line, bytes) else line.encode() for line in BAD[kind]]
    folder = tmp_path / "bad"
    folder.mkdir()
    for part in range(2):
        (folder / f"train-{part}.{kind}").write_bytes(b"\n".join(lines) + b"\n")
    settings = {"on_error": "skip", "batch_size": 1, "max_length": 32}
    settings |= {"kind": PlainText, "block": False} if kind == "txt" else {}
    data = make(workers, train=str(folder), **settings)
    one = folder / f"train-0.{kind}"
    table = make(train=str(one), streaming=False, **settings)
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
        for batch in islice(make(train=str(one), **settings).train_dataloader(), len(ids))
    ]
    assert sorted(got) == ids


def test_what_cannot_be_skipped_in(make, write, tmp_path):
    for file in (write("c.json", [row(1)]), "owner/name"):
        with pytest.raises(DataError, match=r"by line(; \"c\.json\" is none)?\. Set data\.on_error to raise"):
            make(train=file, on_error="skip")
    empty = tmp_path / "none.jsonl"
    empty.write_text("{\n")
    with pytest.raises(DataError, match="it holds no examples"):
        make(train=str(empty), on_error="skip")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_documents_in_full_pieces(make, folder, workers):
    """The tokens of whole documents laid end to end, over turns; each piece full; resumed inside a document."""
    settings = {"kind": PlainText, "text": "prompt", "batch_size": 1}
    ends = make(**settings, block=False, max_length=99).train_dataloader()
    tokens = [token for batch in islice(ends, 100) for token in batch["input_ids"][0].tolist()]
    pieces = [batch["input_ids"][0].tolist() for batch in islice(make(**settings, max_length=7).train_dataloader(), 60)]
    assert [token for piece in pieces for token in piece] == tokens[: 60 * 7]
    assert {len(piece) for piece in pieces} == {7}
    whole = plain(islice(make(workers, **settings, max_length=3).train_dataloader(), 40))
    assert all(batch["labels"] == batch["input_ids"] for batch in whole)
    for stop in (1, 2, 7, 16, 29) if workers == 0 else (2, 16):
        stopped = make(workers, **settings, max_length=3).train_dataloader()
        assert plain(islice(stopped, stop)) == whole[:stop]
        resumed = make(workers, **settings, max_length=3).train_dataloader()
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
    assert "data        1 train rows could not be read and were left out" in capsys.readouterr().out


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_settings_that_a_stream_cannot_have():
    for settings, message in (
        ({"group_by_length": True}, r"streaming is True; group_by_length needs all lengths"),
        ({"shuffle_block": 0}, r"shuffle_block is 0; it must be at least 1"),
        ({"held_out_rows": 0}, r"held_out_rows is 0; it must be at least 1; validation_fraction 0 holds none out"),
    ):
        with pytest.raises(SettingsError, match=rf"^Completions\.{message}"):
            Completions(**{"train": "x.jsonl", "streaming": True, **settings})


def test_a_run_without_an_end(make):
    data = make()
    for change in ({"max_steps": -1}, {"limit_train_batches": 0.5}):
        data.trainer = SimpleNamespace(**{"max_steps": 5, "limit_train_batches": 1.0, **change})
        with pytest.raises(SettingsError, match=r"a stream has no end: set trainer\.max_steps, and leave"):
            data.train_dataloader()


def test_another_number_of_workers(make):
    state = make(2).train_dataloader().state_dict()
    with pytest.raises(ResumeError, match=r"led to 2 readers of the stream .* and to 0 now; .* Resume with the same"):
        make(0).train_dataloader().load_state_dict(state)


def test_rows_that_cannot_be_used(make, write, folder):
    with pytest.raises(DataError, match=r'^Completions\.prompt is "promt"; many has the columns prompt, completion'):
        make(prompt="promt")
    with pytest.raises(DataError, match=r'^Completions\.train is ".*nothing\.jsonl"; no such file'):
        make(train="nothing.jsonl")
    gap = make(train=write("g.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": null, "completion": "b"}'))
    with pytest.raises(DataError, match=r'^g\.jsonl: "prompt" is missing in a row: '):
        list(islice(gap.train_dataloader(), 3))
    good = "\n".join(json.dumps(row(n)) for n in range(5))
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read: .*b\.jsonl, line 6: Expecting value"):
        make(train=write("b.jsonl", f"{good}\n" + '{"prompt": '))
    bad = make(train=str(folder))
    (folder / "train-2.jsonl").write_text(f"{good}\n[1]\n")
    with pytest.raises(DataError, match=r"^a stream cannot be read on: .*train-2\.jsonl, line 6: a list, not"):
        list(islice(bad.train_dataloader(), 30))
    with pytest.raises(DataError, match=r"streaming is True, so that nobody knows the training examples beforehand"):
        make().examples("train")
