from __future__ import annotations

import pytest
import torch

from lora_lightning.models.tasks.comparing import (
    MeanDifference,
    add_rewards,
    larger,
    reward_metrics,
    reward_rows,
    step_rewards,
)


def test_a_difference_of_means_of_unequal_numbers():
    metric = MeanDifference()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([4.0]))
    metric.update(torch.tensor([3.0]), torch.tensor([]))
    assert float(metric.compute()) == pytest.approx(2.0 - 4.0)


def test_ties_count_half():
    assert larger(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0])).tolist() == [0.0, 0.5, 1.0]


def test_a_batch_of_one_kind_leaves_the_other_alone():
    metrics, none = reward_metrics(), torch.tensor([])
    add_rewards(metrics, torch.tensor([1.0, 3.0]), none, torch.tensor([1.0, 0.0]))
    add_rewards(metrics, none, torch.tensor([-1.0]), torch.tensor([1.0]))
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert found == pytest.approx({"accuracy": 2 / 3, "reward_chosen": 2.0, "reward_rejected": -1.0, "margin": 3.0})
    step = step_rewards(torch.tensor([1.0, 3.0]), none, torch.tensor([1.0, 0.0]))
    assert {name: float(value) for name, value in step.items()} == {"accuracy": 0.5, "reward_chosen": 2.0}


def test_predictions_of_pairs_and_of_single_texts():
    assert reward_rows(torch.tensor([[1.0], [3.5]])) == [{"reward_chosen": 1.0, "reward_rejected": 3.5, "margin": -2.5}]
    assert reward_rows(torch.tensor([[1.0, 2.0]])) == [{"reward": 1.0}, {"reward": 2.0}]
