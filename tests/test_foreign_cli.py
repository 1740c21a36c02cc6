"""A LightningCLI that knows nothing of this library: the class paths that `show` prints, appended by `callbacks+=`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from pages import DOCS
from projects import Plain, loader
from safetensors.torch import load_file

PROJECT = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI, OptimizerCallable


class Classifier(LightningModule):
    def __init__(self, optimizer: OptimizerCallable = torch.optim.AdamW):
        super().__init__()
        self.trunk, self.head, self.make = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2), optimizer

    def training_step(self, batch):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.head(self.trunk(x).relu()), y)

    def configure_optimizers(self):
        return self.make(self.parameters())


class Points(LightningDataModule):
    def train_dataloader(self):
        torch.manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 2, (64,)))
        return torch.utils.data.DataLoader(data, batch_size=4)


if __name__ == "__main__":
    LightningCLI(Classifier, Points)
"""
CONFIG = """
trainer:
  max_steps: 6
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks: [{class_path: lightning.pytorch.callbacks.ModelSummary}]
"""


def words_of_the_page() -> str:
    """The words that the page shows for a LightningCLI of somebody else."""
    text = (DOCS / "lightning.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"(?:^ {4}.*\n)+", text, flags=re.M) if "callbacks+=" in block)


def test_hydra_makes_the_callbacks_of_the_page(tmp_path, monkeypatch):
    """A project with the layers `used` and `head`, by Hydra itself where it is installed."""
    instantiate = pytest.importorskip("hydra.utils").instantiate
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "lightning.md").read_text(encoding="utf-8")
    block = next(
        block
        for block in re.findall(r"^```{code-block} yaml\n(.*?)^```", text, flags=re.M | re.S)
        if "_target_" in block
    )
    callbacks = list(instantiate(yaml.safe_load(block.replace("[trunk]", "[used]"))["callbacks"]))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_steps=4, callbacks=callbacks, **options).fit(Plain(), loader())
    assert (tmp_path / "hydra_adapter" / "adapter.safetensors").is_file()


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LORA_LIGHTNING_")}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=180
    )


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_words_of_the_page_train_an_adapter(tmp_path):
    (tmp_path / "project.py").write_text(PROJECT)
    (tmp_path / "project.yaml").write_text(CONFIG)
    line = words_of_the_page().replace("\\\n", " ").split()
    assert line[:2] == ["python", "project.py"]
    done = python(tmp_path, *(word.strip("'") for word in line[1:]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Trainable params" in done.stdout + done.stderr  # the callback of the config stays
    adapter = load_file(tmp_path / "adapter" / "adapter.safetensors")
    (key,) = (key for key in adapter if key.endswith("lora_B"))
    assert adapter[key].shape == (8, 2)
    assert torch.count_nonzero(adapter[key])


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["InjectAdapters", "TrainingGuard", "RoseLoRA", "RiemannianAdamW"])
def test_show_prints_the_class_paths_of_the_page(tmp_path, name):
    shown = python(tmp_path, "-m", "lora_lightning", "show", name)
    assert shown.returncode == 0, shown.stderr
    (path,) = re.findall(r"class_path: (\S+?),? in a LightningCLI", shown.stdout)
    assert path in words_of_the_page()
