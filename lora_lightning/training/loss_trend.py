"""Whether a training loss was still falling when a run ended, or never fell, beyond what its noise makes up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from statistics import fmean, median
from typing import Literal

WINDOWS = 24
"""Means of windows below which nothing is said."""
MOST = 400
"""Points that are compared with one another; of more, neighbours become one."""
MUCH = 0.05
"""Part of a run's whole fall that its last quarter must make up to be said to fall still."""
SURE = 2.5
"""Standard deviations of Kendall's S that the fall of the last quarter must have; noise has it once in 160 times."""
UNSURE = 1.28
"""Those below which there is no sign of a trend: nine in ten series of noise fall less."""

Trend = Literal["falling", "never fell"]


def trend(history: Sequence[Mapping[str, float]], name: str = "train_loss") -> Trend | None:
    """What the logged means of windows say of the loss; None where that is nothing, or they are too few.

    Trends are judged by Mann and Kendall's test, which counts pairs of points that fall and rise and so knows no
    outliers; sizes are medians. "falling": the last quarter falls, by a twentieth of the run's whole fall at least.
    "never fell": no fall over the whole run, nor after its first step.

    Args:
        history: points with `step`; a point is the mean since the one before it, and that of step 1 its own loss.
        name: the loss in them.
    """
    points = {int(point["step"]): point[name] for point in history if name in point}
    start = points.pop(1, None) if len(points) > 1 else None
    steps, losses = _thinned(sorted(points), [points[step] for step in sorted(points)])
    if len(losses) < WINDOWS or not all(map(math.isfinite, losses)):
        return None
    quarter = len(losses) // 4
    first, last = losses[:quarter], losses[-quarter:]
    noise = median(abs(b - a) for a, b in pairwise(losses))
    if kendall(losses) > -UNSURE:
        fell_at_once = start is not None and start > median(last) + max(3 * noise, MUCH * abs(median(last)))
        return None if fell_at_once or median(last) < median(first) - noise else "never fell"
    ends = steps[-quarter:]
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in combinations(zip(ends, last, strict=True), 2)]
    fall = -median(slopes) * (ends[-1] - ends[0])
    whole = max(median(first), start if start is not None else -math.inf) - median(last)
    return "falling" if kendall(last) < -SURE and fall >= MUCH * whole > 0 else None


def _thinned(steps: Sequence[int], losses: Sequence[float]) -> tuple[list[int], list[float]]:
    """Means of as many neighbours as leave at most `MOST` points, with their last steps; odd ones in front go."""
    size = -(-len(losses) // MOST) or 1
    begins = range(len(losses) % size, len(losses), size)
    return [steps[at + size - 1] for at in begins], [fmean(losses[at : at + size]) for at in begins]


def kendall(values: Sequence[float]) -> float:
    """Kendall's S, rising less falling pairs, in standard deviations of what noise gives; nearer to 0 by one pair."""
    score = sum((b > a) - (b < a) for a, b in combinations(values, 2))
    count = len(values)
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    return (score - math.copysign(1, score)) / deviation if score else 0.0
