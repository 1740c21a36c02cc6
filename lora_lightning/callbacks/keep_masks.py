"""Which entries survive: sensitivity, kept counts and exact top-k by row, as pure functions.

Sensitivity and the cubic ramp: Zhang et al., 2023, arXiv:2303.10512, section 3.2, as used by Wang et al., 2024,
arXiv:2406.10777, section 3.3. They serve plain torch loops as well as the callbacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

KeepRule = Literal["floor", "ceil", "official"]


def sensitivity(weight: Tensor, grad: Tensor) -> Tensor:
    """|w * dL/dw| entry by entry in float32 at least, from the weight that produced the gradient."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (weight.detach().to(dtype) * grad.to(dtype)).abs_()


def kept_density(step: int, start_step: int, end_step: int, final_density: float) -> float:
    """Density (fraction of entries kept) after optimizer step `step`, from 1: 1 until `start_step`, then a cubic ramp.

    final_density + (1 - final_density) (1 - (t - start) / (end - start))^3, and `final_density` from `end_step` on.
    """
    if step <= start_step:
        return 1.0
    if step >= end_step:
        return final_density
    rest = 1 - (step - start_step) / (end_step - start_step)
    return final_density + (1 - final_density) * rest**3


def keep_count(density: float, n: int, rule: KeepRule = "floor") -> int:
    """How many of `n` entries a density leaves; at least one, so that no rank component dies.

    "floor" never exceeds the density, "ceil" may by less than one entry, "official" is the count of the released
    RoseLoRA code: entries strictly below the k-th smallest go, k = int(n (1 - density)).
    """
    if density >= 1:
        return n
    if rule == "official":
        k = int(n * (1 - density) + 1e-9)
        return n if k == 0 else n - k + 1
    return max(1, math.floor(density * n + 1e-9) if rule == "floor" else math.ceil(density * n - 1e-9))


def keep_top(scores: Tensor, keep: int) -> Tensor:
    """Mask of exactly `keep` entries of largest score along the last axis; the lowest index wins a tie.

    Args:
        scores: (..., n), finite.
        keep: between 1 and n.
    """
    if keep >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    smallest = _kth_largest(scores, keep)
    mask = scores >= smallest
    if bool((mask.sum(-1) == keep).all()):
        return mask
    above, ties = scores > smallest, scores == smallest
    room = keep - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= room))


def keep_best(scores: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Masks like `scores` of the `keep` largest of all of them together; of equal ones the first."""
    first = next(iter(scores.values()))
    pooled = torch.cat([score.flatten().to(first.device) for score in scores.values()])
    parts = keep_top(pooled, keep).split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape).to(score.device) for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    """(..., 1). On the CPU numpy's vectorised sort is twice as fast as torch's topk at adapter sizes."""
    if scores.device.type != "cpu":
        return scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    at = scores.shape[-1] - k
    return torch.from_numpy(np.sort(scores.numpy(), axis=-1)[..., at : at + 1])
