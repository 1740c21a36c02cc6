"""What callbacks watch, beside what a run logs; the lines of doctor are in test_wrong_lines."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lora_lightning.callbacks import KeepBest, RankPruning
from lora_lightning.callbacks.plateau import FollowPlateau
from lora_lightning.cli.preflight.monitors import problems, strangers
from lora_lightning.models.tasks import find_task
from lora_lightning.optim.warmup import WarmUp


def found(*callbacks, task="sequence-classification", validates=True, **settings):
    return list(problems(callbacks, find_task(task, settings or None), validates))


@pytest.mark.parametrize(
    "callback",
    [
        EarlyStopping("val_loss"),
        EarlyStopping("val_accuracy", mode="max"),
        EarlyStopping("train_loss"),
        ModelCheckpoint(monitor=None),
        KeepBest(),
        KeepBest("val_f1"),
    ],
)
def test_what_is_logged_may_be_watched(callback):
    assert found(callback) == []


def test_texts_are_measured_only_where_they_are_generated():
    assert "monitor" in found(KeepBest("val_bleu"), task="causal-lm")[0]
    assert found(KeepBest("val_bleu"), task="causal-lm", generate_batches=2) == []


def test_each_callback_has_its_line():
    lines = found(EarlyStopping("eval_loss"), ModelCheckpoint(monitor="loss"), KeepBest("val_loss", "max"))
    assert [line.split(" is ")[0] for line in lines] == [
        "EarlyStopping.monitor",
        "ModelCheckpoint.monitor",
        "KeepBest.mode",
    ]
    assert lines[2].endswith('but of val_loss less is better; set it to "min".')


def test_without_validation_data_nothing_of_it_is_logged():
    (line,) = found(EarlyStopping("val_loss"), validates=False)
    assert line.endswith("It has no validation data.")


def test_what_schedules_log_may_be_watched():
    assert found(EarlyStopping("rank"), RankPruning(final_rank=1)) == []


class Measures(RankPruning):
    """Cannot say what it logs before it runs, until it is told to."""

    def metrics(self):
        return {"share": 1 / len(self._adapters)}


class Names(Measures):
    def metric_names(self):
        return ["share"]


def test_a_schedule_is_asked_what_it_logs():
    (line,) = found(EarlyStopping("share"), Measures(final_rank=1))
    assert line.endswith(
        "Measures cannot say what it logs (ZeroDivisionError: division by zero); its metric_names() would tell."
    )
    assert "rank" not in line.partition(" Measures cannot")[0]
    assert found(EarlyStopping("share"), Names(final_rank=1)) == []


def follow(**settings):
    return FollowPlateau(WarmUp(decay="plateau", **settings))


def test_a_rate_that_follows_what_nobody_logs():
    assert found(follow()) == found(follow(monitor="val_f1", mode="max")) == found(follow(monitor="train_loss")) == []
    (line,) = found(follow(monitor="eval_loss"))
    assert line.startswith('model.lr_scheduler.monitor is "eval_loss"; the run logs train_loss, val_loss')
    assert 'Did you mean "val_loss"?' in line
    (line,) = found(follow(mode="max"))
    assert line == 'model.lr_scheduler.mode is "max", but of val_loss less is better; set it to "min".'
    (line,) = found(follow(), validates=False)
    assert line.endswith("It has no validation data.")


class LogsItsOwn(Callback):
    """A project's callback, which may log anything."""


def test_a_callback_of_nobody_here_may_log_what_is_watched():
    known = [EarlyStopping("val_loss"), KeepBest(), RankPruning(final_rank=1), Measures(final_rank=1)]
    assert strangers([*known, LogsItsOwn()]) == ["LogsItsOwn"]
