"""Rates that follow a metric: beside a count by hand, resumed within, and errors where nothing can be followed."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import Callback, Checkpoint
from resuming import assert_equal_runs, run
from toy_runs import classification, encoder_folder, labelled_data

from ll_lora import LoRA
from lora_lightning.callbacks.plateau import FollowPlateau
from lora_lightning.errors import NoEffectError, SettingsError
from lora_lightning.optim.warmup import WarmUp, factor


@pytest.fixture
def folder(tmp_path):
    return encoder_folder(tmp_path / "model")


class Watch(Callback):
    """Rates of each step, and what was logged where."""

    phase = 8

    def __init__(self, monitor: str) -> None:
        self.monitor, self.rates, self.seen = monitor, [], []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer, module):
        self.seen.append((trainer.global_step, float(trainer.callback_metrics[self.monitor])))

    def on_train_batch_end(self, trainer, *_):
        if not self.monitor.startswith("val_") and trainer.global_step % trainer.log_every_n_steps == 0:
            self.seen.append((trainer.global_step, float(trainer.callback_metrics[self.monitor])))


class SaveAfterValidation(Checkpoint):
    def __init__(self, path, step: int) -> None:
        self.path, self.step = path, step

    def on_validation_end(self, trainer, module):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(folder, place, callbacks=(), checkpoint=None, **settings):
    schedule = WarmUp(decay="plateau", **settings)
    module = classification(folder, LoRA(rank=2, dropout=0.1), lr_scheduler=schedule)
    options = {"max_steps": 12, "max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    options |= {"log_every_n_steps": 2, "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks)}
    return run(module, labelled_data(folder), place, callbacks, checkpoint, **options)


def by_hand(values, sign, patience, by):
    """The factor after each value; better is by more than a share of 1e-4, torch's default."""
    best, bad, scale, found = None, 0, 1.0, []
    for value in values:
        if best is None or sign * value > sign * best + 1e-4 * abs(best):
            best, bad = value, 0
        else:
            bad += 1
        if bad > patience:
            scale, bad = scale * by, 0
        found.append(scale)
    return found


@pytest.mark.parametrize(
    ("monitor", "mode", "sign", "patience"),
    [("val_loss", None, -1, 1), ("val_loss", "max", 1, 0), ("val_accuracy", None, 1, 0), ("train_loss", "max", 1, 1)],
)
def test_rates_are_those_of_a_count_by_hand(folder, tmp_path, monitor, mode, sign, patience):
    watch = Watch(monitor)
    if monitor == "train_loss":
        watch.on_validation_end = lambda *_: None
    fit(folder, tmp_path, [watch], monitor=monitor, mode=mode, patience=patience, factor=0.25, warmup_fraction=0.25)
    assert [step for step, _ in watch.seen] == [2, 4, 6, 8, 10, 12]
    scales = by_hand([value for _, value in watch.seen], sign, patience, 0.25)
    expected = [1e-3 * factor(step, 12, 3, "plateau") * ([1.0, *scales][step // 2]) for step in range(12)]
    assert watch.rates == pytest.approx(expected, rel=1e-12)
    assert len(set(expected[3:])) > 1 or (monitor == "val_loss" and mode is None)


@pytest.mark.parametrize("step", [4, 6, 8])
def test_a_run_saved_beside_its_validation_resumes_exactly(folder, tmp_path, step):
    settings = {"monitor": "val_loss", "mode": "max", "patience": 1, "factor": 0.5}
    watch = Watch("val_loss")
    whole = fit(folder, tmp_path, [watch, SaveAfterValidation(tmp_path / "last.ckpt", step)], **settings)
    assert len(set(watch.rates[2:])) > 2
    again = Watch("val_loss")
    assert_equal_runs(whole, fit(folder, tmp_path, [again], tmp_path / "last.ckpt", **settings))
    assert again.rates == watch.rates[step:]


def test_a_change_is_said(folder, tmp_path, capsys):
    fit(folder, tmp_path, mode="max", patience=0, factor=0.5, warmup_fraction=0.0)
    assert "rate: 0.001 -> 0.0005 after step 4, val_loss " in capsys.readouterr().out


@pytest.mark.parametrize("monitor", ["val_los", "loss"])
def test_what_nobody_logs_cannot_be_followed(folder, tmp_path, monitor):
    with pytest.raises(NoEffectError, match=rf'lr_scheduler.monitor is "{monitor}"; the run logs .*train_loss'):
        fit(folder, tmp_path, monitor=monitor, mode="min")


def test_a_metric_that_does_not_say_which_way_is_better(folder, tmp_path):
    with pytest.raises(SettingsError, match=r'mode is None; "val_x" does not say whether more of it is better'):
        fit(folder, tmp_path, monitor="val_x")


def test_a_run_that_never_validates_says_so_after_writing(folder, tmp_path):
    module = classification(folder, LoRA(rank=2), lr_scheduler=WarmUp(decay="plateau"))
    with pytest.raises(NoEffectError, match=r'decay is "plateau"; no val_loss came in 3 steps.*val_check_interval'):
        run(module, labelled_data(folder), tmp_path, limit_val_batches=0, max_steps=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 2}, r'WarmUp.patience is 2; decay is "linear", which watches nothing; set decay to "plateau"'),
        ({"monitor": "val_f1", "decay": "cosine"}, r"WarmUp.monitor is 'val_f1'; decay is \"cosine\""),
        ({"decay": "plateau", "factor": 1.0}, r"WarmUp.factor is 1.0; it must lie between 0 and 1"),
        ({"decay": "plateau", "patience": -1}, r"WarmUp.patience is -1; it must be at least 0"),
        ({"decay": "plateau", "mode": "less"}, r"WarmUp.mode is 'less'; it must be \"max\" or \"min\""),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(SettingsError, match=message):
        WarmUp(**settings)


def test_of_the_callback_settings_are_those_of_the_schedule():
    follow = FollowPlateau(WarmUp(decay="plateau", monitor="val_f1"))
    assert (follow.monitor, follow.mode, follow.place) == ("val_f1", None, "model.lr_scheduler")
