from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lora_lightning.cli.compare.statistics import Difference, Runs, compare, holm, in_words


def runs(rows: np.ndarray) -> Runs:
    """Runs whose rows have these values, (seeds, rows)."""
    ones = np.ones(rows.shape[1])
    return Runs({seed: float(r.mean()) for seed, r in enumerate(rows)}, {s: (r, ones) for s, r in enumerate(rows)})


def drawn(rng: np.random.Generator, seeds: int, rows: int, shift: float, spread: float) -> tuple[Runs, Runs]:
    """Two arms on the same rows: a shift, noise of seeds, and noise of rows."""
    hard = rng.normal(size=rows)
    first = hard + spread * rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, rows))
    other = hard + shift + spread * rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, rows))
    return runs(first), runs(other)


@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_intervals_hold_the_true_difference_as_often_as_they_say(monkeypatch, spread):
    """Of 3 seeds and 150 rows, whether seeds hardly matter or matter most; 150 simulated comparisons."""
    monkeypatch.setattr("lora_lightning.cli.compare.statistics.DRAWS", 500)
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(150):
        first, other = drawn(rng, 3, 150, 0.5, spread)
        d = compare({"other": (first, other)}, True)["other"]
        inside += d.low <= 0.5 <= d.high
    assert 0.91 <= inside / 150 <= 1.0


@pytest.mark.slow
def test_rows_alone_give_the_interval_of_the_normal_distribution():
    """Seeds that are all equal: the interval is that of paired rows."""
    rng = np.random.default_rng(2)
    one, two = rng.normal(size=(2, 1, 4000))
    first, other = (runs(np.repeat(rows, 3, axis=0)) for rows in (one, two))
    found = compare({"other": (first, other)}, True)["other"]
    each = (two - one)[0]
    expected = stats.norm.interval(0.95, each.mean(), each.std() / np.sqrt(4000))
    np.testing.assert_allclose((found.low, found.high), expected, atol=0.003)
    assert found.over_rows


def test_without_rows_the_t_interval_of_seeds():
    first, other = Runs({0: 0.5, 1: 0.6, 2: 0.4}), Runs({0: 0.7, 1: 0.65, 2: 0.6})
    found = compare({"other": (first, other)}, True)["other"]
    each = np.array([0.2, 0.05, 0.2])
    half = stats.t.ppf(0.975, 2) * each.std(ddof=1) / np.sqrt(3)
    np.testing.assert_allclose((found.mean, found.low, found.high), (0.15, 0.15 - half, 0.15 + half))
    assert not found.over_rows
    assert found.p == pytest.approx(float(stats.ttest_rel([0.7, 0.65, 0.6], [0.5, 0.6, 0.4]).pvalue))


def test_a_loss_is_better_when_it_is_lower():
    first, other = Runs({0: 2.0, 1: 2.1}), Runs({0: 1.0, 1: 1.101})
    assert compare({"other": (first, other)}, False)["other"].verdict == "better"
    assert compare({"other": (first, other)}, True)["other"].verdict == "worse"


def test_seeds_are_paired_and_few_are_left_out():
    first = Runs({0: 0.5, 1: 0.6})
    assert compare({"other": (first, Runs({1: 0.7}))}, True) == {}
    assert compare({"other": (first, Runs({0: 0.6, 1: 0.7, 5: 9.0}))}, True)["other"].mean == pytest.approx(0.1)


def test_rows_of_other_counts_are_not_paired():
    first = Runs({0: 0.5, 1: 0.5}, {0: (np.ones(4), np.ones(4)), 1: (np.ones(4), np.ones(4))})
    other = Runs({0: 0.6, 1: 0.7}, {0: (np.ones(5), np.ones(5)), 1: (np.ones(5), np.ones(5))})
    assert not compare({"other": (first, other)}, True)["other"].over_rows


def test_more_arms_make_wider_intervals():
    rng = np.random.default_rng(3)
    first, other = drawn(rng, 3, 200, 0.1, 0.1)
    alone = compare({"a": (first, other)}, True)["a"]
    among = compare(dict.fromkeys("abc", (first, other)), True)["a"]
    assert among.high - among.low > alone.high - alone.low
    assert among.p >= alone.p


def test_holms_rule():
    """The values of R's p.adjust."""
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == pytest.approx({"a": 1.0, "b": 1.0})


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.011, 0.028, "better by 1.9 points (1.1 to 2.8)"),
        (-0.028, -0.010, "worse by 1.9 points (1.0 to 2.8)"),
        (-0.008, 0.046, "no difference found; up to 4.6 points better or 0.8 points worse cannot be excluded"),
    ],
)
def test_what_is_said(low, high, said):
    mean = -0.019 if high < 0 else 0.019
    assert in_words(Difference(mean, low, high, 0.01, 3, True), percent=True) == said
