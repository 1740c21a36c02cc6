"""How near one value of a layer is to a multiple of another, as sums over forwards say.

    v ~ c u,   error = |v - c u| / |u + v|

    u, v   what a layer adds up, of one shape; v comes from other layers
    c      a number that stands for v / u once v is not there

Sums are of (|x|, sum |x'|, u.u, v.v, u.v), token by token: x is the layer's input and x' are those of the other layers,
whose norms are another estimate of c. They add up over batches of any size, over processes too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lora_lightning.adapters.base import Approximation, RunningSum
from lora_lightning.errors import AdapterStateError

Estimate = Literal["inputs", "fit"]
SIZE = 5
"""Numbers that are summed."""


def norm(value: Tensor) -> Tensor:
    """The sum over rows of their norms, in float32, detached."""
    size: Tensor = torch.linalg.vector_norm(value.detach().float(), dim=-1).sum()
    return size


def observe(sums: RunningSum, x: Tensor, others: Sequence[Tensor], u: Tensor, v: Tensor | None) -> None:
    """Add what one forward has seen.

    Args:
        sums: takes it.
        x: the layer's input.
        others: norms of the inputs of the other layers.
        u: the layer's own value.
        v: the others' together; None for zero.
    """
    own = u.detach().float()
    other = torch.zeros_like(own) if v is None else v.detach().float()
    outside = torch.stack([*others]).sum() if others else own.new_zeros(())
    products = [(own * own).sum(), (other * other).sum(), (own * other).sum()]
    sums.add(torch.stack([norm(x), outside, *products]), x.numel())


def ratio(means: Tensor, estimate: Estimate) -> float:
    """c by the norms of inputs, or the c of least error; 0 where there is no u."""
    x, outside, uu, _, uv = means.tolist()
    above, below = (outside, x) if estimate == "inputs" else (uv, uu)
    return float(above / below) if below else 0.0


def approximate(means: Tensor, estimate: Estimate, A: Tensor, B: Tensor) -> Approximation:
    """(1 + c) B A in place of an update that takes u + v, and the error of that.

    Raises:
        AdapterStateError: nothing has been observed.
    """
    if not means.any():
        raise AdapterStateError(
            "no training step has been measured, so it is not known how the values of layers compare; train the "
            "adapter first."
        )
    c = ratio(means, estimate)
    return Approximation(A.detach(), (1 + c) * B.detach(), error(means, c))


def error(means: Tensor, c: float) -> float:
    """|v - c u| over |u + v|, of the means; 0 where both are zero."""
    _, _, uu, vv, uv = means.double().tolist()
    whole, left = uu + 2 * uv + vv, vv - 2 * c * uv + c * c * uu
    return math.sqrt(max(left, 0.0) / whole) if whole > 0 else 0.0
