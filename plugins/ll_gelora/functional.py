"""Intrinsic dimension by two nearest neighbours (TwoNN).

Facco et al., 2017, Scientific Reports 7:12140. With r1 and r2 the distances of a point to its first and second
neighbour, mu = r2 / r1 has the density d mu^(-d-1) on a manifold of dimension d:

    "mle"    d = N / sum log mu
    "fit"    d = slope through the origin of -log(1 - F) over log mu, F(mu_k) = k / N, the largest mu left out

Departs from the source: equal points are taken as one; points that are all equal have dimension 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lora_lightning.errors import SettingsError

LEAST = 20
"""Fewest different points that a dimension is estimated from."""
CHUNK = 1024
"""Points whose distances to all others are held at once."""


def pooled(x: Tensor, mask: Tensor | None, how: Literal["mean", "first", "last"], channels_first: bool) -> Tensor:
    """One vector an example, (b, d) in float32, of hidden states (b, l, d), (b, d, ...) or (b, d).

    Args:
        x: hidden states.
        mask: (b, l), 1 where a token counts; None, or of another shape, where all do.
        how: their mean, or the first or last one that counts.
        channels_first: whether the channels are the second axis.
    """
    x = x.float()
    if x.dim() == 4 or (channels_first and x.dim() > 2):
        x = x.flatten(2).mT
    if x.dim() == 2:
        return x
    x = x.flatten(1, -2)
    counts = torch.ones(x.shape[:2], device=x.device)
    if mask is not None and mask.shape == x.shape[:2]:
        counts = mask.to(x.device).float()
    if how == "mean":
        return (x * counts[..., None]).sum(1) / counts.sum(1, keepdim=True).clamp_min(1)
    places = torch.arange(x.shape[1], device=x.device)
    weights = counts * (places + 1 if how == "last" else len(places) - places)
    return x[torch.arange(len(x), device=x.device), weights.argmax(1)]


def two_nn(points: Tensor, estimator: Literal["fit", "mle"] = "fit", discard: float = 0.1) -> float:
    """Intrinsic dimension of points (N, d).

    Args:
        points: one a row.
        estimator: "fit" or "mle", see the module.
        discard: fraction of the largest ratios that the fit leaves out.

    Raises:
        SettingsError: fewer than `LEAST` different points.
    """
    points = torch.unique(points.double(), dim=0)
    if len(points) == 1:
        return 0.0
    if len(points) < LEAST:
        raise SettingsError(
            f"an intrinsic dimension is estimated from {len(points)} different points; it takes at least {LEAST}. "
            "Look at more batches, or at larger ones."
        )
    points = points - points.mean(0)  # distances come from products, so that large common parts would cost digits
    near = []
    for start in range(0, len(points), CHUNK):
        distances = torch.cdist(points[start : start + CHUNK], points, compute_mode="use_mm_for_euclid_dist")
        own = torch.arange(len(distances))
        distances[own, start + own] = torch.inf
        near.append(distances.topk(2, dim=1, largest=False).values)
    first, second = torch.cat(near).unbind(1)
    ratios = (second / first)[first > 0].log().sort().values
    n = len(ratios)
    if estimator == "mle":
        return float(n / ratios.sum())
    keep = n - max(1, int(discard * n))  # F of the last is 1, whose logarithm is not finite
    F = torch.arange(1, keep + 1, dtype=torch.float64) / n
    x, y = ratios[:keep], -torch.log1p(-F)
    return float((x @ y) / (x @ x))


def gain(before: float, after: float) -> int:
    """Least rank of an update that can add the dimensions: max(round(after - before), 0)."""
    return max(round(after - before), 0)
