"""What is said of a training loss: never of noise, of short runs, or of a run that has converged."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lora_lightning.training.loss_trend import kendall, trend


def history(losses, every: int = 10, start: float | None = None):
    first = [] if start is None else [{"step": 1, "train_loss": start, "lr": 1e-3}]
    points = [{"step": every * (n + 1), "train_loss": float(loss)} for n, loss in enumerate(losses)]
    return [*first, *points, {"step": every, "val_loss": 9.0}]


def noise(seed: int, count: int, size: float = 1.0):
    return size * np.random.default_rng(seed).standard_normal(count)


def test_the_statistic_is_the_one_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for seed in range(5):
        values = noise(seed, 30)
        tau = stats.kendalltau(np.arange(30), values).statistic
        score = tau * 30 * 29 / 2
        deviation = math.sqrt(30 * 29 * 65 / 18)
        assert kendall(values.tolist()) == pytest.approx((score - np.sign(score)) / deviation)


@pytest.mark.parametrize("count", [24, 40, 2000])
def test_a_loss_that_falls_in_a_line_is_still_falling(count):
    for seed in range(5):
        assert trend(history(np.linspace(3, 1, count) + noise(seed, count, 0.02), start=3.0)) == "falling"


def test_a_loss_that_has_converged_hardly_ever_raises_an_alarm():
    steps = np.arange(40)
    said = [trend(history(1 + 2 * np.exp(-8 * steps / 40) + noise(seed, 40, 0.05), start=3.0)) for seed in range(200)]
    assert said.count("falling") <= 2
    assert "never fell" not in said
    still = [trend(history(1 + 2 * np.exp(-8 * steps / 40) + noise(seed, 40, 0.01), start=3.0)) for seed in range(200)]
    assert set(still) == {None}


def test_noise_never_fell_and_is_hardly_ever_falling():
    said = [trend(history(2 + noise(seed, 40, 0.1), start=2.05)) for seed in range(200)]
    assert said.count("falling") <= 2
    assert said.count("never fell") > 140


def test_a_rising_loss_never_fell():
    assert trend(history(np.linspace(2, 9, 30), start=2.0)) == "never fell"


def test_a_fall_within_the_first_window_is_one():
    assert trend(history(0.5 + noise(0, 40, 0.01), start=3.0)) is None


@pytest.mark.parametrize(
    "losses",
    [[], [1.0], np.linspace(3, 1, 23), [float("nan")] * 30],
    ids=["nothing", "one point", "short", "no numbers"],
)
def test_too_little_says_nothing(losses):
    assert trend(history(losses)) is None
    assert trend(history(losses, start=3.0)) is None


def test_single_bad_batches_hide_nothing_and_show_nothing():
    flat = 2 + noise(1, 40, 0.02)
    flat[[5, 33]] = 80.0
    assert trend(history(flat, start=2.0)) == "never fell"
    falling = np.linspace(3, 1, 40)
    falling[[20, 36]] = 80.0
    assert trend(history(falling, start=3.0)) == "falling"
