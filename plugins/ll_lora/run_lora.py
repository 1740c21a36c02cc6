"""RunLoRA: the cheapest order of products for one low-rank layer.

Cherniuk et al., 2023, arXiv:2312.03415, sections 3 and 4.

    y = x W^T + b + s (x A^T) B^T        N tokens, W (d_out, d_in), A (r, d_in), B (d_out, r), G = dL/dy (N, d_out)

    forward   F1  x W^T + s (x A^T) B^T               F2  x (W + s B A)^T
    backward  three independent choices give B1 to B8:
        dA   (G B)^T x   or  B^T (G^T x)
        dB   G^T (x A^T) or  (G^T x) A^T
        dX   G W + (G B) A  or  G (W + B A)

Departs from the paper: the choice is made anew for the shape at hand, not once for a nominal one, and its statement
re-orderings (F3, F4, timed variants) are left out, since they cost the same number of operations.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_lightning.adapters.layers.base import BaseLayer, reshaped
from lora_lightning.adapters.low_rank import add_low_rank


def add_low_rank_cheaply(
    base: BaseLayer, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """base(x) + s B (A x) in the cheapest order for this many tokens; the product that LowRankAdapter is given.

    Dense linear layers only: elsewhere, with dropout and under autocast it is `add_low_rank`.
    """
    if dropout or not base.dense or torch.is_autocast_enabled(x.device.type):
        return add_low_rank(base, x, lora_A, lora_B, scaling, dropout)
    flat = x.reshape(-1, x.shape[-1])
    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    needs = Needs(x.requires_grad, A.requires_grad, B.requires_grad)
    merged = x.dtype in (torch.float32, torch.float64)
    order = choose(flat.shape[0], base.d_in, base.d_out, A.shape[0], needs, merged=merged)
    y = contract(flat, base.weight(), base.bias, A, B, scaling, order)
    return y if x.dim() == 2 else reshaped(y, (*x.shape[:-1], base.d_out))


class Backward(NamedTuple):
    """One backward order; True takes the second formula of the module's table."""

    dA_full: bool
    dB_full: bool
    dX_merged: bool


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    A: bool
    B: bool


BACKWARDS: dict[str, Backward] = {
    "B1": Backward(False, False, False),
    "B2": Backward(False, True, False),
    "B3": Backward(True, True, False),
    "B4": Backward(True, True, True),
    "B5": Backward(False, False, True),
    "B6": Backward(True, False, False),
    "B7": Backward(True, False, True),
    "B8": Backward(False, True, True),
}


def forward_flops(n: int, d_in: int, d_out: int, rank: int) -> dict[str, int]:
    """Floating-point operations of F1 and F2 for `n` tokens (two a multiply-add)."""
    return {
        "F1": 2 * (n * d_in * d_out + n * rank * (d_in + d_out)),
        "F2": 2 * (n * d_in * d_out + rank * d_in * d_out),
    }


def backward_flops(n: int, d_in: int, d_out: int, rank: int, needs: Needs) -> dict[str, int]:
    """Floating-point operations of B1 to B8; terms of gradients that are not needed vanish."""
    full, a, b, merge = n * d_in * d_out, n * rank * d_in, n * rank * d_out, rank * d_in * d_out
    costs = {}
    for name, order in BACKWARDS.items():
        uses_GB = (needs.A and not order.dA_full) or (needs.x and not order.dX_merged)
        uses_GX = (needs.A and order.dA_full) or (needs.B and order.dB_full)
        cost = b * uses_GB + full * uses_GX
        cost += (merge if order.dA_full else a) * needs.A
        cost += (merge if order.dB_full else a + b) * needs.B
        cost += (full + (merge if order.dX_merged else a)) * needs.x
        costs[name] = 2 * cost
    return costs


def choose(n: int, d_in: int, d_out: int, rank: int, needs: Needs, merged: bool = True) -> tuple[str, str]:
    """Cheapest (forward, backward); the earlier name wins a tie.

    `merged` says whether W + B A may be formed. In half precision it may not: rounding it drops most of a small update.
    """
    forwards = forward_flops(n, d_in, d_out, rank)
    backwards = backward_flops(n, d_in, d_out, rank, needs)
    if not merged:
        forwards = {"F1": forwards["F1"]}
        backwards = {name: cost for name, cost in backwards.items() if not BACKWARDS[name].dX_merged}
    return min(forwards, key=forwards.__getitem__), min(backwards, key=backwards.__getitem__)


class Contraction(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T in a chosen order; keeps x and the parameters for backward, nothing else.

    Inputs: x (N, d_in), weight (d_out, d_in), bias (d_out,) or None, A (r, d_in), B (d_out, r).
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, order: tuple[str, str]
    ) -> Tensor:
        """The product in `order`'s forward."""
        if order[0] == "F2":
            return torch.nn.functional.linear(x, _merge(weight, B, A, scaling), bias)
        y = torch.nn.functional.linear(x, weight, bias)
        return y.addmm_(x @ A.mT, B.mT, alpha=scaling)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004 - autograd's signature
        """Keep x and the parameters."""
        x, weight, bias, A, B, ctx.scaling, ctx.order = inputs
        ctx.save_for_backward(x, weight, A, B)
        ctx.has_bias = bias is not None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in `order`'s backward."""
        x, W, A, B = ctx.saved_tensors
        s, order = ctx.scaling, BACKWARDS[ctx.order[1]]
        needs = Needs(ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        uses_GB = (needs.A and not order.dA_full) or (needs.x and not order.dX_merged)
        uses_GX = (needs.A and order.dA_full) or (needs.B and order.dB_full)
        GB: Any = G @ B if uses_GB else None
        GX: Any = G.mT @ x if uses_GX else None
        dX = dA = dB = None
        if needs.A:
            dA = (B.mT @ GX if order.dA_full else GB.mT @ x).mul_(s)
        if needs.B:
            dB = (GX @ A.mT if order.dB_full else G.mT @ (x @ A.mT)).mul_(s)
        if needs.x:
            dX = G @ _merge(W, B, A, s) if order.dX_merged else torch.addmm(G @ W, GB, A, alpha=s)
        db = G.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dX, None, db, dA, dB, None, None


def contract(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, order: tuple[str, str]
) -> Tensor:
    """x W^T + b + s (x A^T) B^T, (N, d_out), in a chosen order forward and backward."""
    y: Tensor = Contraction.apply(x, weight, bias, A, B, scaling, order)  # type: ignore[no-untyped-call]
    return y


def _merge(W: Tensor, B: Tensor, A: Tensor, s: float) -> Tensor:
    """W + s B A in W's own memory layout, so that B = 0 gives the base's output to the last bit."""
    if W.is_contiguous():
        return torch.addmm(W, B, A, alpha=s)
    return torch.addmm(W.mT, A.mT, B.mT, alpha=s).mT


def all_orders() -> list[tuple[str, str]]:
    """Every (forward, backward) pair."""
    return list(itertools.product(("F1", "F2"), BACKWARDS))
