"""How far training moves the magnitudes and the directions of a weight's vectors, and how the two go together.

Liu et al., 2024, arXiv:2402.09353, section 3.2 and figure 2.

    dM = mean_j | |W_j| - |S_j| |          dD = mean_j (1 - cos(W_j, S_j))

    paper  here       shape
    W_FT   weight     (d_out, d_in)   the weight after some steps; of an adapter, the merged one
    W_0    start      (d_out, d_in)   the pretrained weight
    j      vectors    rows (axis "out", one an output) or columns (axis "in", one an input)

Departs from the paper: its columns are rows here, since nn.Linear stores the transpose; axis "in" is the literal
reading. A vector that is zero in either weight has no direction, is left out of both means, and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Axis = Literal["out", "in"]
_CHUNK = 4_000_000
"""Entries that are widened to float64 at once."""


@dataclass(frozen=True)
class Change:
    """What happened to the vectors of one weight; NaN where none has a direction."""

    magnitude: float
    """dM."""
    direction: float
    """dD."""
    vectors: int
    """Vectors that both means run over."""
    skipped: int
    """Zero vectors, which neither runs over."""


@torch.no_grad()
def weight_change(weight: Tensor, start: Tensor, axis: Axis = "out") -> Change:
    """dM and dD of `weight` against `start`, both (*lead, d_out, d_in), accumulated in float64."""
    if axis == "in":
        weight, start = weight.mT, start.mT
    weight, start = weight.flatten(0, -2), start.flatten(0, -2)  # stacked experts: the vectors of all of them
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    # float64 does not exist on every device
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device
    magnitude = direction = 0.0
    vectors = 0
    for rows, start_rows in zip(weight.split(step), start.split(step), strict=True):
        new, old = rows.to(device, torch.float64), start_rows.to(device, torch.float64)
        norm, old_norm = new.norm(dim=1), old.norm(dim=1)
        kept = (norm > 0) & (old_norm > 0)
        new, old, norm, old_norm = new[kept], old[kept], norm[kept], old_norm[kept]
        magnitude += float((norm - old_norm).abs().sum())
        # 1 - cos = |u - v|^2 / 2 of unit vectors, which loses nothing where the two are close
        direction += float((new / norm[:, None] - old / old_norm[:, None]).square().sum()) / 2
        vectors += int(kept.sum())
    count = vectors or float("nan")
    return Change(magnitude / count, direction / count, vectors, weight.shape[0] - vectors)


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of two lists; NaN where one of them is constant or has fewer than two numbers."""
    centred = _centred(x, y)
    if centred is None:
        return float("nan")
    dx, dy = centred
    size = float(dx.norm() * dy.norm())
    return float(dx @ dy) / size if size else float("nan")


def least_squares(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the line of least squared vertical distance to the points; NaN where x is constant."""
    centred = _centred(x, y)
    if centred is None or not float(centred[0].norm()):
        return float("nan"), float("nan")
    dx, dy = centred
    slope = float(dx @ dy) / float(dx @ dx)
    return slope, sum(y) / len(y) - slope * sum(x) / len(x)


def _centred(x: Sequence[float], y: Sequence[float]) -> tuple[Tensor, Tensor] | None:
    if len(x) < 2:
        return None
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    return a - a.mean(), b - b.mean()
