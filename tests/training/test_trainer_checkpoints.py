"""Trainer checkpoints and other files survive a kill, a full disk and an unwritable folder."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from limits import small_files
from torch.utils.data import DataLoader

from lora_lightning.errors import ResumeError, RunFolderError
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


def test_a_damaged_checkpoint_restores_nothing(tmp_path):
    """Numbers of a flipped bit would train on; torch compares no checksum."""
    module, data = Regression(), DataLoader(torch.linspace(-1, 1, 8).view(8, 1))
    fit(tmp_path, module, data, max_epochs=1)
    path = tmp_path / "last.ckpt"
    weight = module.layer.weight.detach().numpy().tobytes()
    content = path.read_bytes()
    assert content.count(weight) == 1
    at = content.index(weight)
    path.write_bytes(content[: at + 3] + bytes([content[at + 3] ^ 64]) + content[at + 4 :])
    fresh = Regression()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(ResumeError, match=r'last.ckpt" is truncated or damaged: state_dict.layer.weight is not what'):
        fit(tmp_path, fresh, data, max_epochs=2, ckpt_path=path)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    path.write_bytes(content)
    fit(tmp_path, fresh, data, max_epochs=2, ckpt_path=path)
    assert fresh.steps == 8


class Regression(LightningModule):
    """One weight and its momentum."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1, bias=False)
        self.steps = 0

    def training_step(self, batch, _):
        self.steps += 1
        return self.layer(batch.expand(-1, 3)).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


def fit(folder, module, data, ckpt_path=None, **options):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [ModelCheckpoint(folder, "last", enable_version_counter=False)]
    trainer = Trainer(callbacks=callbacks, plugins=[AtomicCheckpoints()], **quiet, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
