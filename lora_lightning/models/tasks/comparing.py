"""Rewards of texts that are compared: what the preference and reward tasks measure alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric


class MeanDifference(Metric):  # type: ignore[misc]
    """The mean of some numbers less the mean of others, of which there may be as many or not."""

    total: Tensor
    other_total: Tensor
    count: Tensor
    other_count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "other_total", "count", "other_count"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values: Tensor, others: Tensor) -> None:
        """Add some of each."""
        self.total += values.sum()
        self.other_total += others.sum()
        self.count += values.numel()
        self.other_count += others.numel()

    def compute(self) -> Tensor:
        """The difference; not a number where one kind is missing."""
        return self.total / self.count - self.other_total / self.other_count


def reward_metrics() -> dict[str, Metric]:
    """Fresh metrics; see `add_rewards`."""
    names = ("accuracy", "reward_chosen", "reward_rejected")
    return {**{name: MeanMetric() for name in names}, "margin": MeanDifference()}


def add_rewards(metrics: Mapping[str, Metric], chosen: Tensor, rejected: Tensor, right: Tensor) -> None:
    """Add rewards to the metrics of `reward_metrics`.

    Args:
        metrics: accuracy, mean rewards, and their difference, the margin.
        chosen: rewards of what was chosen, (n,).
        rejected: rewards of what was rejected, (m,).
        right: of each comparison 1 where it comes out right, 1/2 for a tie.
    """
    metrics["accuracy"].update(right)
    metrics["reward_chosen"].update(chosen)
    metrics["reward_rejected"].update(rejected)
    metrics["margin"].update(chosen, rejected)


def step_rewards(chosen: Tensor, rejected: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The same numbers of one batch; those of a kind that it lacks are left out."""
    found = {"accuracy": right.mean(), "reward_chosen": chosen.mean(), "reward_rejected": rejected.mean()}
    found["margin"] = found["reward_chosen"] - found["reward_rejected"]
    return {name: value for name, value in found.items() if not bool(value.isnan())}


def larger(values: Tensor, others: Tensor) -> Tensor:
    """1 where a value is larger than the other, 1/2 where they are equal, else 0."""
    return ((values > others).float() + (values >= others).float()) / 2


def reward_rows(rewards: Tensor) -> list[dict[str, Any]]:
    """Predictions: of two sides (2, rows) both rewards and their difference, of one (1, rows) the reward."""
    sides = [side.tolist() for side in rewards]
    if len(sides) == 1:
        return [{"reward": round(value, 6)} for value in sides[0]]
    return [
        {"reward_chosen": round(c, 6), "reward_rejected": round(r, 6), "margin": round(c - r, 6)}
        for c, r in zip(*sides, strict=True)
    ]


def example_pairs(size: int, length: int) -> dict[str, Any]:
    """A batch of `size` pairs of texts of `length` tokens, all zeros, with a label on each token."""
    ids = torch.zeros(2 * size, length, dtype=torch.int64)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "sides": torch.tensor(2),
        "reference": torch.zeros(size, 2),
    }
