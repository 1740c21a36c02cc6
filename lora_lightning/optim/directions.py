"""Element-wise steps over directions: what an optimizer does once each parameter's direction is known.

Adam is Kingma and Ba, 2014, arXiv:1412.6980, with the decoupled decay of Loshchilov and Hutter, 2017, arXiv:1711.05101.

    m = b1 m + (1 - b1) d,   v = b2 v + (1 - b2) d^2
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    p = p (1 - lr wd) - lr u

Adam of transformers, which several authors' code is built on, adds eps before the correction and decays after the step:

    u = (m / (1 - b1^t)) / ((sqrt(v) + eps) / sqrt(1 - b2^t))
    p = (p - lr u) (1 - lr wd)

    paper  here         shape
    d      gradients    like its parameter; a raw or a preconditioned gradient
    m, v   exp_avg(_sq) like its parameter, in its state
    t      step         a number in its state

Of a parameter that is sharded on several processes each steps its own, and its moments lie like it.

Departs from the papers: nothing known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lora_lightning.distributed import as_shard_of, local

AdamForm = Literal["torch", "transformers"]
"""Where eps is added and when parameters decay: after the correction and before the step, or the other way round."""

Directions = Mapping[Tensor, Tensor]
"""What to step each parameter along, like the parameter or like this process's shard of it, by parameter."""


def adam(
    optimizer: Optimizer, gradients: Directions, bias_correction: bool = True, form: AdamForm = "torch"
) -> dict[Tensor, Tensor]:
    """u for this process's shard of every parameter in `gradients`; advances its moments.

    `betas` and `eps` are its group's.
    """
    found: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p in gradients]
        if params:
            shards = [local(gradients[p]) for p in params]
            states = [_started(optimizer.state[p], p, shard) for p, shard in zip(params, shards, strict=True)]
            steps = _adam(shards, states, group["betas"], group["eps"], bias_correction, form)
            found |= dict(zip(params, steps, strict=True))
    return found


def _started(state: dict[str, Any], parameter: Tensor, shard: Tensor) -> dict[str, Any]:
    if "step" not in state:
        moments = {name: as_shard_of(torch.zeros_like(shard), parameter) for name in ("exp_avg", "exp_avg_sq")}
        state |= {"step": 0, **moments}
    return state


def _adam(
    d: list[Tensor],
    states: list[dict[str, Any]],
    betas: tuple[float, float],
    eps: float,
    bias_correction: bool,
    form: AdamForm,
) -> list[Tensor]:
    b1, b2 = betas
    for state in states:
        state["step"] += 1
    m, v = [local(state["exp_avg"]) for state in states], [local(state["exp_avg_sq"]) for state in states]
    torch._foreach_lerp_(m, d, 1 - b1)
    torch._foreach_mul_(v, b2)
    torch._foreach_addcmul_(v, d, d, 1 - b2)
    c1 = [1 - b1 ** state["step"] if bias_correction else 1.0 for state in states]
    c2 = [math.sqrt(1 - b2 ** state["step"]) if bias_correction else 1.0 for state in states]
    below = list(torch._foreach_sqrt(v))
    if form == "transformers":
        torch._foreach_add_(below, eps)
    torch._foreach_div_(below, c2)
    if form == "torch":
        torch._foreach_add_(below, eps)
    u = torch._foreach_div(m, below)
    torch._foreach_div_(u, c1)
    return list(u)


def descend(optimizer: Optimizer, directions: Directions, form: AdamForm = "torch") -> None:
    """p (1 - lr wd) - lr d for every parameter in `directions`; `lr` and `weight_decay` are its group's."""
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p in directions]
        if params:
            shards = [local(p) for p in params]
            kept = 1 - group["lr"] * group["weight_decay"]
            if form == "torch":
                torch._foreach_mul_(shards, kept)
            torch._foreach_add_(shards, [local(directions[p]) for p in params], alpha=-group["lr"])
            if form == "transformers":
                torch._foreach_mul_(shards, kept)
