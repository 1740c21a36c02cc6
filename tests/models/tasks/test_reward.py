from __future__ import annotations

from math import exp, log
from types import SimpleNamespace

import pytest
import torch

from lora_lightning.errors import SettingsError
from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import PredictContext

REWARDS = [[1.0, -0.5, 2.0], [0.5, 0.25, 2.0]]


def batch_of(sides=2):
    ids = torch.ones(3 * sides, 4, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": ids, "sides": torch.tensor(sides)}


def model(input_ids, attention_mask):
    return SimpleNamespace(logits=torch.tensor(REWARDS).reshape(-1, 1)[: len(input_ids)])


@pytest.mark.parametrize("center", [0.0, 0.2])
def test_the_loss_is_bradley_terrys(center, measured):
    task, batch = find_task("reward", {"center": center}), batch_of()
    logits = task.logits(model, batch)
    loss = task.loss(logits, batch)
    expected = sum(-log(1 / (1 + exp(r - c))) + center * (c + r) ** 2 for c, r in zip(*REWARDS, strict=True))
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert int(loss.count) == 3
    found = measured(task, [(logits, batch)])
    assert (found["accuracy"], found["margin"]) == pytest.approx((0.5, (0.5 - 0.75) / 3))
    assert loss.beside.keys() == found.keys() - {"loss"}


def test_predictions():
    task = find_task("reward")
    assert task.predict(model, batch_of(), PredictContext())[1] == {
        "reward_chosen": -0.5,
        "reward_rejected": 0.25,
        "margin": -0.75,
    }
    assert task.predict(model, batch_of(1), PredictContext()) == [{"reward": value} for value in REWARDS[0]]


def test_settings_are_checked():
    with pytest.raises(SettingsError, match=r"Reward.center is -1; it must be at least 0"):
        find_task("reward", {"center": -1})


def test_the_model_has_one_output():
    assert find_task("reward").model_options(7)["num_labels"] == 1
