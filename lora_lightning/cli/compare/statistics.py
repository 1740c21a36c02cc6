"""Whether arms differ: intervals of paired differences over rows and seeds, corrected for their number.

Seeds and rows are both samples. An interval comes from the bootstrap over both at once: rows are drawn anew, seeds are
drawn anew, and the difference is that of the arms' metrics on what was drawn. The bootstrap knows nothing of how few
seeds there are. So its spread over n seeds is made good by n / (n - 1), and its quantiles by those of Student's
distribution over the normal one's, with the degrees of freedom of Satterthwaite. Where the metric is no mean over rows,
SciPy's t interval of the paired differences of seeds is taken. p values are corrected by Holm's rule, intervals by
Bonferroni's, so that what they say holds for all arms together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

DRAWS = 4000
"""Bootstrap draws."""
LEVEL = 0.95


@dataclass(frozen=True)
class Runs:
    """Final runs of an arm."""

    values: Mapping[int, float]
    """The metric, by seed."""
    rows: Mapping[int, tuple[Any, Any]] = field(default_factory=dict)
    """Sums and counts of validation rows, by seed, see `Task.score_rows`; empty where there are none."""


@dataclass(frozen=True)
class Difference:
    """How much better an arm is than another one: above 0 is better, whatever the metric's direction."""

    mean: float
    low: float
    high: float
    p: float
    """Corrected by Holm's rule."""
    seeds: int
    over_rows: bool
    """Whether rows were drawn as well as seeds."""

    @property
    def verdict(self) -> str:
        """Better, worse, or no difference found."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference found"


def compare(pairs: Mapping[str, tuple[Runs, Runs]], higher_is_better: bool) -> dict[str, Difference]:
    """How much better the second of each pair of arms is; pairs with fewer than two seeds in common are left out.

    Args:
        pairs: what is compared with what, by a name.
        higher_is_better: of the metric.
    """
    level = 1 - (1 - LEVEL) / max(len(pairs), 1)
    found = {}
    for name, (first, runs) in pairs.items():
        seeds = sorted(set(first.values) & set(runs.values))
        if len(seeds) >= 2:
            found[name] = _difference(first, runs, seeds, 1.0 if higher_is_better else -1.0, level)
    corrected = holm({name: difference.p for name, difference in found.items()})
    return {name: Difference(d.mean, d.low, d.high, corrected[name], d.seeds, d.over_rows) for name, d in found.items()}


def _difference(first: Runs, runs: Runs, seeds: list[int], sign: float, level: float) -> Difference:
    each = sign * np.array([runs.values[seed] - first.values[seed] for seed in seeds])
    mean = float(each.mean())
    paired = set(seeds) <= set(first.rows) & set(runs.rows)
    if paired:
        a, b = ([rows[seed] for seed in seeds] for rows in (first.rows, runs.rows))
        paired = all(np.array_equal(x[1], y[1]) for x, y in zip(a, b, strict=True))
    if paired:
        drawn = mean + sign * _bootstrap(a, b, level)
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        return Difference(mean, float(low), float(high), min(1.0, 2 * (beyond + 1) / (DRAWS + 1)), len(seeds), True)
    spread = float(each.std(ddof=1))
    if spread == 0:
        return Difference(mean, mean, mean, 0.0 if mean else 1.0, len(seeds), False)
    test = stats.ttest_1samp(each, 0.0)
    interval = test.confidence_interval(level)
    return Difference(mean, float(interval.low), float(interval.high), float(test.pvalue), len(seeds), False)


def _bootstrap(first: list[tuple[Any, Any]], other: list[tuple[Any, Any]], level: float) -> Any:
    """How far the difference of the metric is off its mean on drawn seeds and rows, (DRAWS,)."""
    rng = np.random.default_rng(0)
    sums = np.stack([y[0] - x[0] for x, y in zip(first, other, strict=True)])
    counts = np.stack([x[1] for x in first])
    seeds, rows = sums.shape
    by_seed = np.concatenate([_on_drawn_rows(rng, sums, counts, size) for size in _blocks(rows)])  # (draws, seeds)
    chosen = rng.integers(seeds, size=(DRAWS, seeds))
    centre = by_seed.mean(axis=1)
    of_seeds = math.sqrt(seeds / (seeds - 1)) * (np.take_along_axis(by_seed, chosen, axis=1).mean(axis=1) - centre)
    of_rows = centre - centre.mean()
    parts = [(float(of_seeds.var()), seeds - 1), (float(of_rows.var()), max(rows - 1, 1))]
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return np.zeros(DRAWS)
    freedom = total**2 / sum(variance**2 / free for variance, free in parts)
    at = (1 + level) / 2
    return (of_rows + of_seeds) * (stats.t.ppf(at, freedom) / stats.norm.ppf(at))


def _on_drawn_rows(rng: np.random.Generator, sums: Any, counts: Any, size: int) -> Any:
    """Each seed's value on `size` draws of rows, (size, seeds)."""
    rows = sums.shape[1]
    weights = rng.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(np.float64)
    return (weights @ sums.T) / np.maximum(weights @ counts.T, 1e-300)


def _blocks(rows: int) -> list[int]:
    """Draws at a time, so that a block has a few million numbers at most."""
    size = max(1, min(DRAWS, 4_000_000 // rows))
    return [min(size, DRAWS - start) for start in range(0, DRAWS, size)]


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """p values corrected by Holm's rule (neither SciPy nor scikit-learn has it)."""
    found, largest = {}, 0.0
    for rank, name in enumerate(sorted(values, key=lambda name: values[name])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[name]))
        found[name] = largest
    return found


def in_words(difference: Difference, percent: bool) -> str:
    """What can be said of a difference.

    Args:
        difference: to the other arm.
        percent: whether the metric is a fraction, of which hundredths are points.
    """
    unit, digits = (100.0, 1) if percent else (1.0, 4)
    mean, low, high = (unit * value for value in (difference.mean, difference.low, difference.high))
    points = " points" if percent else ""
    if difference.verdict == "better":
        return f"better by {mean:.{digits}f}{points} ({low:.{digits}f} to {high:.{digits}f})"
    if difference.verdict == "worse":
        return f"worse by {-mean:.{digits}f}{points} ({-high:.{digits}f} to {-low:.{digits}f})"
    return (
        f"no difference found; up to {max(high, 0):.{digits}f}{points} better or {max(-low, 0):.{digits}f}{points} "
        "worse cannot be excluded"
    )
