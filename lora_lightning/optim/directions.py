"""Element-wise steps over directions: what an optimizer does once each parameter's direction is known.

Adam is Kingma and Ba, 2014, arXiv:1412.6980, with the decoupled decay of Loshchilov and Hutter, 2017, arXiv:1711.05101.

    m = b1 m + (1 - b1) d,   v = b2 v + (1 - b2) d^2
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    p = p (1 - lr wd) - lr u

    paper  here         shape
    d      gradients    like its parameter; a raw or a preconditioned gradient
    m, v   exp_avg(_sq) like its parameter, in its state
    t      step         a number in its state

Departs from the papers: nothing known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Directions = Mapping[Tensor, Tensor]
"""What to move each parameter along, like the parameter, by parameter."""


def adam(optimizer: Optimizer, gradients: Directions, bias_correction: bool = True) -> dict[Tensor, Tensor]:
    """u for every parameter in `gradients`; advances its moments. `betas` and `eps` are its group's."""
    found: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p in gradients]
        if params:
            states = [optimizer.state[p] for p in params]
            moved = _adam([gradients[p] for p in params], states, group["betas"], group["eps"], bias_correction)
            found |= dict(zip(params, moved, strict=True))
    return found


def _adam(
    d: list[Tensor], states: list[dict[str, Any]], betas: tuple[float, float], eps: float, bias_correction: bool
) -> list[Tensor]:
    b1, b2 = betas
    for direction, state in zip(d, states, strict=True):
        if "step" not in state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(direction), "exp_avg_sq": torch.zeros_like(direction)}
        state["step"] += 1
    m, v = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
    torch._foreach_lerp_(m, d, 1 - b1)
    torch._foreach_mul_(v, b2)
    torch._foreach_addcmul_(v, d, d, 1 - b2)
    c1 = [1 - b1 ** state["step"] if bias_correction else 1.0 for state in states]
    c2 = [math.sqrt(1 - b2 ** state["step"]) if bias_correction else 1.0 for state in states]
    below = torch._foreach_div(torch._foreach_sqrt(v), c2)
    torch._foreach_add_(below, eps)
    u = torch._foreach_div(m, below)
    torch._foreach_div_(u, c1)
    return list(u)


def descend(optimizer: Optimizer, directions: Directions) -> None:
    """p (1 - lr wd) - lr d for every parameter in `directions`; `lr` and `weight_decay` are its group's."""
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p in directions]
        if params:
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, [directions[p] for p in params], alpha=-group["lr"])
