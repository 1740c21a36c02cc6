"""CE-LoRA's cheap gradient of a frozen linear layer's input, as pure functions, and the autograd node that uses it.

Chen et al., 2025, arXiv:2502.01378, approximated matrix multiplication and Double-LoRA.

    dx ~= (G B0) A0 + sum over j in S of G_j W_s,j          W = B0 A0 + W_s
        = sum over j in S of G_j W_j + (G_rest B0_rest) A0   the same sum, without forming rows of W_s

    paper    here         shape
    G        G            (N, d_out)       gradient of the output, N tokens
    W        weight       (d_out, d_in)
    B0, A0   B0, A0       (d_out, r0), (r0, d_in)
    S        index        (K,)             kept channels, ascending
    -        share        (K,)             1 / (K p_j) for drawn channels; None stands for ones
    p        kept         K = ceil(kept * d_out)

Departs from the paper: A0 (or B0) is orthonormal and its partner carries all singular values, where the paper gives
each the root of them; the product is the same. Kept rows come from W itself and B0 A0 serves the other channels only,
so that keeping all channels is exact and no rows of W_s are rebuilt. Norms of G are taken for each column; the released
code takes one for the whole matrix, which leaves the choice to the rows of W_s alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - the field's usual name


def channel_count(kept: float, d_out: int) -> int:
    """K = ceil(kept * d_out); a product that is whole but for rounding is not rounded up."""
    return math.ceil(kept * d_out - 1e-9)


def split(weight: Tensor, svd_rank: int) -> tuple[Tensor, Tensor]:
    """(B0 (d_out, r0), A0 (r0, d_in)), whose product is the best approximation of rank r0, in the weight's dtype.

    From the eigenvectors of the smaller Gram matrix in float64: much less work than all singular vectors, and exact to
    float32 and beyond in the leading ones.
    """
    W = weight.detach().double()
    wide = W.shape[0] < W.shape[1]
    gram = W @ W.mT if wide else W.mT @ W
    leading = torch.linalg.eigh(gram).eigenvectors[:, -svd_rank:].flip(1)
    B0, A0 = (leading, leading.mT @ W) if wide else (W @ leading, leading.mT)
    return B0.to(weight.dtype).contiguous(), A0.to(weight.dtype).contiguous()


def row_norms(weight: Tensor, B0: Tensor | None, A0: Tensor | None) -> Tensor:
    """Norms (d_out,) of the rows of W_s = W - B0 A0, in float32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rest = weight.detach().to(dtype)
    if B0 is not None and A0 is not None:
        rest = torch.addmm(rest, B0.to(dtype), A0.to(dtype), alpha=-1.0)
    norms: Tensor = torch.linalg.vector_norm(rest, dim=1)
    return norms


def top_channels(scores: Tensor, count: int) -> Tensor:
    """The `count` channels of largest score, ascending; the lowest index wins a tie."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def draw_channels(scores: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` channels drawn with probability p by score, with replacement, ascending, and 1 / (count p) for each.

    Drawn on the CPU, so that every process and device finds the same. Scores that are all zero give equal chances.
    """
    p = scores.detach().cpu().double()
    p = p / p.sum() if p.any() else torch.full_like(p, 1 / len(p))
    index = torch.multinomial(p, count, replacement=True, generator=generator).sort().values if count else p[:0].long()
    share = 1 / (count * p[index])
    return index.to(scores.device), share.to(scores)


def _others(B0: Tensor, index: Tensor, share: Tensor | None) -> Tensor:
    """B0 with each channel's row times the part of it that `index` and `share` leave."""
    if share is None:
        return B0.index_fill(0, index, 0.0)
    return B0.index_add(0, index, B0.index_select(0, index) * share[:, None], alpha=-1.0)


def grad_input(
    G: Tensor,
    weight: Tensor,
    index: Tensor | None,
    share: Tensor | None,
    B0: Tensor | None,
    A0: Tensor | None,
    norms: Tensor | None = None,
) -> Tensor:
    """Gradient (N, d_in) of the layer's input, in the dtype of G; exact where `index` is None.

    Adds the squared norm of each column of G to `norms` (d_out,).
    """
    if norms is not None:
        norms.add_(torch.linalg.vector_norm(G.detach(), dim=0, dtype=norms.dtype).square_())
    if index is None:
        return G @ weight.to(G.dtype)
    kept = G.index_select(1, index)
    if share is not None:
        kept = kept * share.to(G.dtype)
    dx = kept @ weight.index_select(0, index).to(G.dtype)
    if B0 is not None and A0 is not None:
        h = G @ _others(B0.to(G.dtype), index, None if share is None else share.to(G.dtype))
        dx.addmm_(h, A0.to(G.dtype))
    return dx


class CheapLinear(torch.autograd.Function):
    """x W^T + b whose backward keeps no input, approximates dx, and may add up squared column norms of its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        share: Tensor | None,
        B0: Tensor | None,
        A0: Tensor | None,
        norms: Tensor | None,
    ) -> Tensor:
        """The product as the layer computes it."""
        # `norms` grows in backward, so it is no saved tensor: two forwards before one backward would clash over it
        ctx.norms, ctx.dtype = norms, x.dtype
        ctx.save_for_backward(weight, index, share, B0, A0)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the bias; the weight is frozen."""
        # products in forward autocast, those in backward must not: G has the right dtype already
        with torch.autocast(G.device.type, enabled=False):
            rows = G.reshape(-1, G.shape[-1])
            weight, index, share, B0, A0 = ctx.saved_tensors
            dx = grad_input(rows, weight, index, share, B0, A0, ctx.norms)
            dx = dx.view(*G.shape[:-1], dx.shape[-1]).to(ctx.dtype)
            dbias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, None, None, None, None, None


def cheap_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    share: Tensor | None = None,
    B0: Tensor | None = None,
    A0: Tensor | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """x W^T + b (..., d_out), bit for bit, with `grad_input` as its backward.

    Args:
        x: (..., d_in).
        weight: (d_out, d_in); gets no gradient.
        bias: (d_out,) or None.
        index: kept channels (K,); None for all of them.
        share: weights of the kept channels (K,); None for ones.
        B0: (d_out, r0), or None without a split.
        A0: (r0, d_in), or None without a split.
        norms: (d_out,), to which backward adds the squared norm of each column of the output's gradient.
    """
    y: Tensor = CheapLinear.apply(x, weight, bias, index, share, B0, A0, norms)  # type: ignore[no-untyped-call]
    return y
