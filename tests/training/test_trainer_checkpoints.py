"""Trainer checkpoints and other files survive a kill, a full disk and an unwritable folder."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from limits import small_files

from lora_lightning.errors import RunFolderError, SettingsError
from lora_lightning.storage.atomic import write_atomically
from lora_lightning.training.predictions import WritePredictions, write_rows
from lora_lightning.training.trainer_checkpoints import AtomicCheckpoints

KILLED = """
import itertools, sys, torch
from pathlib import Path
from lora_lightning.saving import AtomicCheckpoints
for n in itertools.count(1):
    AtomicCheckpoints().save_checkpoint({"n": torch.full((200_000,), n)}, Path(sys.argv[1]) / "last.ckpt")
    print(n, flush=True)
"""


@pytest.mark.slow
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    saved = [int(process.stdout.readline()) for _ in range(3)]
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    values = torch.load(tmp_path / "last.ckpt", weights_only=True)["n"]
    assert bool((values == values[0]).all())
    assert int(values[0]) >= saved[-1]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"n": 1}, path)
    refusal = pytest.raises(RunFolderError, match=r'cannot write the checkpoint ".*last.ckpt": .*before is intact')
    with refusal, small_files(20_000):
        AtomicCheckpoints().save_checkpoint({"n": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True) == {"n": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_an_error_that_is_no_lack_of_space_stays_what_it_is(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpoints().save_checkpoint({"n": lambda: None}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_write_atomically_replaces_only_when_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def half(file):
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_predictions_of_difficult_text_read_back(tmp_path, ending):
    rows = [
        {"index": 0, "text": 'a "quoted", text\nof two lines', "prediction": "ü"},
        {"index": 1, "text": "", "prediction": "b"},
    ]
    path = tmp_path / f"out{ending}"
    write_rows(path, rows)
    if ending == ".csv":
        with path.open(newline="") as file:
            read = [{**row, "index": int(row["index"])} for row in csv.DictReader(file)]
    else:
        import json

        read = [json.loads(line) for line in path.read_text().splitlines()]
    assert read == rows


def test_predictions_that_cannot_be_written(tmp_path):
    with pytest.raises(SettingsError, match=r'--output is "x.parquet"; it must end in .csv or .jsonl'):
        WritePredictions("x.parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write"):
        write_rows(Path(tmp_path / "file" / "out.csv"), [{"a": 1}])


def test_class_numbers_are_written_as_names(tmp_path):
    class Data:
        label_names = ("first", "second")

        def inputs(self, split):
            return [{"text": "a", "label": 1}, {"text": "b", "label": 0}]

    writer = WritePredictions(tmp_path / "out.csv")
    for rows in (
        [{"index": 1, "prediction": "first"}],
        [{"index": 0, "prediction": "second"}],
        [{"index": 1, "prediction": "first"}],
    ):
        writer.on_predict_batch_end(None, None, rows, None, 0)
    writer.on_predict_end(SimpleNamespace(datamodule=Data(), is_global_zero=True), None)
    with (tmp_path / "out.csv").open() as file:
        assert [(row["text"], row["label"], row["prediction"]) for row in csv.DictReader(file)] == [
            ("a", "second", "second"),
            ("b", "first", "first"),
        ]
