"""Checkpoints by the clock and where a run is asked to stop; what goes on from them equals a run without a stop."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from resuming import assert_equal_runs, run
from toy_runs import classification, decoder_folder, encoder_folder, labelled_data

from ll_lora import LoRA
from lora_lightning.data import Completions
from lora_lightning.errors import SettingsError, TrainingError
from lora_lightning.training.module import AdapterModule
from lora_lightning.training.save_often import SaveOften, stopped

NOW = 1e-9
"""Minutes that are over at every batch."""
ALL = {
    "enable_checkpointing": True,
    "accumulate_grad_batches": 2,
    "max_steps": -1,
    "max_epochs": 2,
    "limit_train_batches": 6,
}


class SendAt(Callback):
    """Sends a signal to this process before the given batch, or before a batch of a validation."""

    def __init__(self, number: int, batch: int, validating: bool = False) -> None:
        self.number, self.left, self.validating = number, batch, validating

    def _count(self):
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        self.left -= 1

    def on_train_batch_start(self, *_):
        if not self.validating:
            self._count()

    def on_validation_batch_start(self, *_):
        if self.validating:
            self._count()


@pytest.fixture
def folder(tmp_path):
    return encoder_folder(tmp_path / "model")


def fit(folder, place, *callbacks, checkpoint=None, **options):
    module = classification(folder, LoRA(rank=2, dropout=0.1))
    return run(module, labelled_data(folder), place, callbacks, checkpoint, **{**ALL, **options})


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(11))
def test_a_run_goes_on_from_any_batch_as_if_it_had_not_stopped(folder, tmp_path, batch):
    """Inside accumulation windows, at their ends, at the end of an epoch, beside validations."""
    place = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"stopped by SIGTERM before its end; it goes on with fit --resume .*run"):
        fit(folder, place, SaveOften(place), SendAt(signal.SIGTERM, batch))
    whole = fit(folder, tmp_path / "whole", SaveOften(tmp_path / "whole"))
    resumed = fit(folder, place, SaveOften(place), checkpoint=place / "last.ckpt")
    assert_equal_runs(whole, resumed)


@pytest.mark.parametrize("interval", [2, 3])
def test_a_stop_within_a_validation_is_exact_too(folder, tmp_path, interval):
    options = {"val_check_interval": interval}
    with pytest.raises(TrainingError, match="stopped by SIGTERM"):
        fit(folder, tmp_path, SaveOften(tmp_path), SendAt(signal.SIGTERM, 1, validating=True), **options)
    whole = fit(folder, tmp_path / "whole", SaveOften(tmp_path / "whole"), **options)
    assert_equal_runs(whole, fit(folder, tmp_path, SaveOften(tmp_path), checkpoint=tmp_path / "last.ckpt", **options))


def test_ctrl_c_stops_with_a_checkpoint_and_means_what_it_meant_afterwards(folder, tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingError, match="stopped by Ctrl-C before its end; it goes on with fit --resume"):
        fit(folder, tmp_path, SaveOften(tmp_path), SendAt(signal.SIGINT, 5))
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping after this batch, with a checkpoint; Ctrl-C again stops at once" in capsys.readouterr().out
    whole = fit(folder, tmp_path / "whole", SaveOften(tmp_path / "whole"))
    assert_equal_runs(whole, fit(folder, tmp_path, SaveOften(tmp_path), checkpoint=tmp_path / "last.ckpt"))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once(folder, tmp_path):
    class Twice(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        fit(folder, tmp_path, SaveOften(tmp_path), Twice())
    assert isinstance(stop.value.__context__, KeyboardInterrupt)
    assert not (tmp_path / "last.ckpt").exists()
    signal.signal(signal.SIGINT, before)  # Lightning ignores Ctrl-C from its first one on


def steps_saved(folder, minutes, **options) -> list[int]:
    """The steps at which last.ckpt was written."""
    found = []

    class Note(SaveOften):
        def _save(self, trainer):
            super()._save(trainer)
            found.append(torch.load(folder / "last.ckpt", weights_only=True)["global_step"])

    fit(encoder_folder(folder / "model"), folder, Note(folder, minutes), **options)
    return found


def test_by_the_clock(tmp_path):
    assert steps_saved(tmp_path / "a", NOW, accumulate_grad_batches=1) == list(range(1, 13))
    assert steps_saved(tmp_path / "b", 5.0) == []
    assert steps_saved(tmp_path / "c", None) == []


def test_a_checkpoint_of_somebody_else_starts_the_clock_again(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lora_lightning.training.save_often.time.monotonic", lambda: now[0])
    saving = SaveOften(tmp_path, 5.0)
    now[0] = 299.0
    assert not saving._is_time()
    saving.on_save_checkpoint(None, None, {})
    now[0] = 400.0
    assert not saving._is_time()
    now[0] = 599.0
    assert saving._is_time()


def test_in_a_stream_without_validation_data(tmp_path):
    """A run that never validates and has no end but its steps."""
    folder = decoder_folder(tmp_path / "model")
    rows = [{"prompt": f"w{n} w{n + 3}", "completion": f"w{n + 1} w{2 * n % 40}"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def fit(checkpoint=None, *callbacks):
        module = AdapterModule(
            str(folder), LoRA(rank=2), task="causal-lm", targets=["q_proj"], linear_baseline=False, seed=1
        )
        settings = {"tokenizer": str(folder), "batch_size": 4, "streaming": True, "validation_fraction": 0.0}
        data = Completions(train=str(tmp_path / "rows.jsonl"), **settings)
        options = {"max_steps": 9, "max_epochs": -1, "enable_checkpointing": True}
        return run(module, data, tmp_path, [SaveOften(tmp_path), *callbacks], checkpoint, **options)

    whole = fit()
    with pytest.raises(TrainingError, match="goes on with fit --resume"):
        fit(None, SendAt(signal.SIGTERM, 4))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 5
    assert_equal_runs(whole, fit(tmp_path / "last.ckpt"))


@pytest.mark.parametrize("minutes", [0, -1.0, 0.0])
def test_minutes_are_above_zero(tmp_path, minutes):
    with pytest.raises(SettingsError, match=r"SaveOften.checkpoint_minutes is .*; it must be above 0, or null"):
        SaveOften(tmp_path, minutes)


def test_what_is_said_can_be_pasted(tmp_path):
    place = tmp_path / "my runs" / "001"
    assert stopped("SIGTERM", place, tmp_path).endswith("before its first checkpoint; start it again.")
    place.mkdir(parents=True)
    (place / "last.ckpt").touch()
    assert stopped("SIGTERM", place, tmp_path).endswith("it goes on with fit --resume 'my runs/001'")
    elsewhere = tmp_path / "elsewhere"
    assert stopped("SIGTERM", place, elsewhere).endswith(f"it goes on with fit --resume '{place}'")
