"""What a run keeps for a comparison; whole runs with it are in test_child.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from toy_runs import classification, encoder_folder, labelled_data, trainer

from ll_lora import LoRA
from lora_lightning.cli.compare.measured import MEASURED, POINTS, ROWS, Measured


class Device(Callback):
    """Whether all was measured while the model was still where it was trained: it leaves its device after this hook."""

    phase, measured = 99, False

    def on_train_end(self, trainer, pl_module):
        folder = Path(trainer.default_root_dir)
        self.measured = (folder / MEASURED).is_file() and (folder / ROWS).is_file()


@pytest.fixture
def measured(tmp_path):
    """A run of six steps, and what it has left."""
    seed_everything(0)
    model = encoder_folder(tmp_path / "model")
    module, data = classification(model, LoRA(rank=2)), labelled_data(model)
    callback = Measured(tmp_path)
    run = trainer(tmp_path, [Device(), callback], max_steps=6, val_check_interval=3, check_val_every_n_epoch=None)
    run.fit(module, datamodule=data)
    return tmp_path, run


def test_points_are_the_validations(measured):
    folder, run = measured
    points = [json.loads(line) for line in (folder / POINTS).read_text().splitlines()]
    assert [point["step"] for point in points] == [3, 6]
    assert points[-1]["values"]["accuracy"] == pytest.approx(float(run.callback_metrics["val_accuracy"]))


def test_rows_are_those_of_the_last_state(measured):
    folder, run = measured
    with np.load(folder / ROWS) as rows:
        assert set(np.unique(rows["sums"])) <= {0.0, 1.0}
        assert rows["sums"].mean() == pytest.approx(float(run.callback_metrics["val_accuracy"]))


def test_what_it_cost(measured):
    assert next(c for c in measured[1].callbacks if isinstance(c, Device)).measured
    cost = json.loads((measured[0] / MEASURED).read_text())
    assert cost["steps"] == 6
    assert 0 < cost["step_seconds"] < cost["seconds"]
