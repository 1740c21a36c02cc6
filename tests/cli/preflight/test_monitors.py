"""What callbacks watch, beside what a run logs; the lines of doctor are in test_wrong_lines."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lora_lightning.callbacks import KeepBest, RankPruning
from lora_lightning.cli.preflight.monitors import problems
from lora_lightning.models.tasks import find_task


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
