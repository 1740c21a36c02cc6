"""The mixture of low-rank experts as pure functions: routing, the gated product with its rescaled backward, losses.

Sun et al., 2025, arXiv:2502.15828. For one token x, with d the gradient at y,

    l = G x,   g_i = softmax of l over the k largest entries, 0 elsewhere,   e_i = s B_i A_i x
    y = W x + b + sum_i g_i e_i

    backward, c_i = g_i^q and c_i = 0 where g_i = 0:
    de_i = c_i d,   dl through dg_i = d . e_i (whatever q is),   so  dA_i = s c_i B_i^T d x^T,  dB_i = s c_i d (A_i x)^T

    paper        here            shape
    x, y         x, y            (..., d_in), (..., d_out); N tokens as rows
    G            router          (E, d_in)      no bias
    A_i, B_i     A, B            (E, r, d_in), (E, d_out, r)
    l            logits          (N, E)         float32 at least
    g            gates           (N, E)         rows sum to 1, at most k entries above 0
    q            exponent        a number in [0, 1]: 1 is the plain gradient, 1/2 the paper's rescaling
    s            scaling         a number

Departs from the paper: q is free. The paper wants gradients weighted by 1/g, which is q = 0, and realises sqrt(g) in
backward, q = 1/2: a preconditioned step then moves expert i's part of the output by g_i^(3/2) rather than g_i. Experts
share one dropout mask. The two auxiliary losses belong to other papers and are off by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_lightning.adapters.low_rank import autocast_dtype, rows

Watcher = Callable[[Tensor], None]
"""Told the gates (N, E) once in each backward."""


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision; float64 stays."""
    return torch.promote_types(dtype, torch.float32)


class RouterLogits(torch.autograd.Function):
    """x G^T in float32 at least, autocast or not, keeping x itself where autograd would keep a float32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor) -> Tensor:
        """Keeps x and the router."""
        ctx.save_for_backward(x, router)
        dtype = at_least_float32(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return rows(x).to(dtype) @ router.to(dtype).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and the router."""
        x, router = ctx.saved_tensors
        dx = drouter = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = (d @ router.to(d.dtype)).view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[1]:
                drouter = (d.mT @ rows(x).to(d.dtype)).to(router.dtype)
        return dx, drouter


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """G x for each token: (..., d_in) and (E, d_in) to (N, E)."""
    logits: Tensor = RouterLogits.apply(x, router)  # type: ignore[no-untyped-call]
    return logits


def gates(logits: Tensor, top_k: int) -> Tensor:
    """Softmax over the `top_k` largest logits of each row, zero elsewhere: (N, E) to (N, E).

    Equal to selecting from the full softmax and dividing by the selected sum, without the division. Nothing is
    scattered: Inductor has compiled scatters to wrong values for CUDA (pytorch issues 182012 and 191571).
    """
    experts = logits.shape[-1]
    if top_k == experts:
        return logits.softmax(-1)
    largest = logits.detach().topk(top_k, dim=-1).indices
    chosen = (largest[..., None] == torch.arange(experts, device=logits.device)).any(-2)
    return torch.where(chosen, logits, -torch.inf).softmax(-1)


class GatedExperts(torch.autograd.Function):
    """y + s sum_i g_i B_i A_i (x * mask), whose backward weighs experts by g_i^q; nothing of size N x E x d_out exists.

    The weight is a constant for autograd: the slope of g^q at g = 0 is infinite, and 0 * inf is not a number.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        mask: Tensor | None,
        A: Tensor,
        B: Tensor,
        g: Tensor,
        scaling: float,
        exponent: float,
        watcher: Watcher | None,
    ) -> Tensor:
        """Keeps x, the mask, h = A (x * mask), the factors and the gates."""
        # a quantized layer keeps its input's dtype under autocast, and its output must come through unrounded
        device, dtype = x.device.type, torch.promote_types(autocast_dtype(x) or x.dtype, y.dtype)
        ctx.dtype, ctx.scaling, ctx.exponent, ctx.watcher = dtype, scaling, exponent, watcher
        with torch.autocast(device, enabled=False):
            h = _masked(x, mask, dtype) @ A.flatten(0, 1).to(dtype).mT
            # into a tensor of the final shape: a Function that returns a view forbids in-place ops on its output
            out = torch.empty(y.shape, dtype=dtype, device=y.device)
            weighted = _by_expert(h, scaling * g, g.shape[1])
            torch.addmm(rows(y).to(dtype), weighted, _side_by_side(B).to(dtype).mT, out=rows(out))
        ctx.save_for_backward(x, mask, h, A, B, g)
        return out.to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, x, A, B and the gates."""
        x, mask, h, A, B, g = ctx.saved_tensors
        if ctx.watcher is not None:
            ctx.watcher(g)
        needs, (E, r, _) = ctx.needs_input_grad, A.shape
        dx = dA = dB = dg = None
        with torch.autocast(x.device.type, enabled=False):
            weight = ctx.scaling * torch.where(g > 0, g.pow(ctx.exponent), 0.0)
            d_rows = rows(d).to(ctx.dtype)
            back = d_rows @ _side_by_side(B).to(ctx.dtype)
            dh = _by_expert(back, weight, E)
            if needs[1]:
                dx = _masked(dh @ A.flatten(0, 1).to(ctx.dtype), mask, x.dtype).view(x.shape)
            if needs[3]:
                dA = (dh.mT @ _masked(x, mask, ctx.dtype)).view(A.shape).to(A.dtype)
            if needs[4]:
                dB = (d_rows.mT @ _by_expert(h, weight, E)).view(-1, E, r).transpose(0, 1).to(B.dtype)
            if needs[5]:
                dg = ctx.scaling * (back * h).view(-1, E, r).sum(-1, dtype=g.dtype)
        return d if needs[0] else None, dx, None, dA, dB, dg, None, None, None


def _masked(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(..., width) times a byte mask of as many entries, as rows of `dtype`."""
    return (rows(x) if mask is None else rows(x) * rows(mask)).to(dtype)


def _by_expert(h: Tensor, weight: Tensor, experts: int) -> Tensor:
    """h (N, E r) with the r entries of each expert times its weight (N, E)."""
    blocks = h.view(h.shape[0], experts, h.shape[1] // experts)
    return (blocks * weight.to(h.dtype)[..., None]).view(h.shape)


def _side_by_side(B: Tensor) -> Tensor:
    """(E, d_out, r) as (d_out, E r)."""
    return B.transpose(0, 1).flatten(1)


def gated_experts(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    g: Tensor,
    *,
    scaling: float,
    exponent: float,
    mask: Tensor | None = None,
    watcher: Watcher | None = None,
) -> Tensor:
    """y + s sum_i g_i B_i A_i (x * mask) with gradients to experts and x weighted by g_i^q.

    Args:
        y: (..., d_out), the base layer's output; the sum has its dtype.
        x: (..., d_in).
        A: (E, r, d_in).
        B: (E, d_out, r).
        g: (N, E), gates of the tokens in their order.
        scaling: s; the caller divides it by 1 - dropout where there is a mask.
        exponent: q.
        mask: bytes like x, 1 where an entry is kept; one mask for all experts.
        watcher: told the gates in backward, which recomputed forwards run only once.
    """
    total: Tensor = GatedExperts.apply(y, x, mask, A, B, g, scaling, exponent, watcher)  # type: ignore[no-untyped-call]
    return total


def selected(g: Tensor) -> Tensor:
    """Tokens that each expert received, (E,): rows of the gates (N, E) above zero."""
    return (g > 0).sum(0).to(g.dtype)


def balance_loss(logits: Tensor, g: Tensor) -> Tensor:
    """E sum_i f_i mean_t p_i: f_i the fraction of assignments that expert i received, p the softmax over all experts.

    1 where either is uniform, E / k where one set of k experts has it all; 0 without tokens. f is a constant. Fedus et
    al., 2022, arXiv:2101.03961, section 2.2, for k choices.
    """
    load = selected(g)
    fraction = load / load.sum().clamp_min(1)
    return logits.shape[1] * (fraction * logits.softmax(-1).sum(0)).sum() / max(logits.shape[0], 1)


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(l)^2; 0 without tokens. Zoph et al., 2022, arXiv:2202.08906."""
    return logits.logsumexp(-1).square().sum() / max(logits.shape[0], 1)


def load_statistics(load: Tensor) -> dict[str, Tensor]:
    """How evenly experts are used, from the fraction of tokens each received, (..., E).

    Returns:
        `max_over_mean` (1 at balance, E / k at worst), `entropy` of the assignments over log E (1 at balance), and
        `dead`, the fraction of experts that received nothing.
    """
    experts = load.shape[-1]
    fraction = load / load.sum(-1, keepdim=True)
    entropy = torch.special.entr(fraction).sum(-1)
    return {
        "max_over_mean": experts * fraction.amax(-1),
        "entropy": entropy / torch.tensor(float(max(experts, 2)), device=load.device).log(),
        "dead": (load == 0).to(load.dtype).mean(-1),
    }
