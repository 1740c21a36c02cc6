"""Trainer checkpoints and other files survive a kill, a full disk and an unwritable folder."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from limits import small_files

from lora_lightning.errors import RunFolderError
from lora_lightning.storage.atomic import write_atomically
from lora_lightning.training.trainer_checkpoints import AtomicCheckpoints

KILLED = """
import itertools, sys, torch
from pathlib import Path
from lora_lightning.training.trainer_checkpoints import AtomicCheckpoints
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
