"""Which rates an arm is tried with: a coarse grid that moves until the best lies inside it, then finer around it."""

from __future__ import annotations

import math
from collections.abc import Mapping

COARSE = math.sqrt(10)
"""Ratio of neighbours of the coarse grid."""
MOST_MOVES = 5
"""Rates that are tried beyond the first three, in one direction."""


def next_rates(start: float, done: Mapping[float, float], higher_is_better: bool, refine: bool = True) -> list[float]:
    """Rates that are to be tried next; none where the best is found, or lies on the edge after all moves.

    Args:
        start: the middle of the first three rates.
        done: values by rate; runs that failed are not a number, and count as worse than any.
        higher_is_better: of the values.
        refine: whether rates between the best and its neighbours are tried at the end.
    """
    grid = [rounded(start * COARSE**step) for step in (-1, 0, 1)]
    if left := [rate for rate in grid if rate not in done]:
        return left
    tried = sorted(done)
    best = best_rate(done, higher_is_better)
    if best is None:  # nothing came out: lower ones
        lower = rounded(tried[0] / COARSE)
        return [lower] if len(tried) < 3 + MOST_MOVES else []
    moves = len([rate for rate in tried if rate < grid[0] or rate > grid[-1]])
    if best in (tried[0], tried[-1]) and moves < MOST_MOVES:
        return [rounded(best / COARSE if best == tried[0] else best * COARSE)]
    if not refine or is_edge(done, higher_is_better):
        return []
    at = tried.index(best)
    wide = [(low, high) for low, high in ((tried[at - 1], best), (best, tried[at + 1])) if high / low > COARSE * 0.9]
    return [rounded(math.sqrt(low * high)) for low, high in wide]


def best_rate(done: Mapping[float, float], higher_is_better: bool) -> float | None:
    """The rate of the best value; of equal ones the lowest; None where none is a number."""
    numbers = {rate: value for rate, value in sorted(done.items()) if not math.isnan(value)}
    sign = -1 if higher_is_better else 1
    return min(numbers, key=lambda rate: sign * numbers[rate]) if numbers else None


def is_edge(done: Mapping[float, float], higher_is_better: bool) -> bool:
    """Whether the best of the rates is the lowest or the highest of all."""
    best, tried = best_rate(done, higher_is_better), sorted(done)
    return len(tried) > 1 and best in (tried[0], tried[-1])


def rounded(rate: float) -> float:
    """A rate with three digits, so that the same one is found again in another process."""
    return float(f"{rate:.3g}")
