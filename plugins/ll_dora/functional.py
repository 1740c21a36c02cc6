"""DoRA's equations as pure functions.

Liu et al., 2024, arXiv:2402.09353, equations 5 (weight), 6 (full gradient) and 11 (detached norm), section 5.6.

    V  = W + s B A                      direction, never formed
    n  = |V_j| for each row j           n_j^2 = |W_j|^2 + 2 s <(W A^T)_j, B_j> + s^2 <(B A A^T)_j, B_j>
    c  = m / n
    W' = c V                            row by row
    y  = b + c x W^T + c s x A^T B^T    the bias is not scaled

    paper  here            shape (out, in as nn.Linear stores it)
    W0     weight          (d_out, d_in)              frozen
    A, B   lora_A, lora_B  (rank, d_in), (d_out, rank)
    m      magnitude       (d_out,)                   starts at the row norms of W
    n^2    squares         (d_out,)
    c      ratio           (d_out,)                   exactly 1 at the start

With x~ for x after dropout: y = b + x W^T + (c - 1) x~ W^T + c s x~ A^T B^T. Without dropout that is the sum above, and
it is computed in this form always: at c = 1 and B = 0 it adds zeros to the base layer's own output.

Departs from the paper: the norm is taken over rows as nn.Linear stores them, which are the paper's columns; the
equations there have no scaling s, no bias and no dropout. A row without a norm (V_j = 0) has c_j = 1, so that its
factors learn; the paper divides by zero there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from lora_lightning.adapters.layers.base import BaseLayer, plus_product
from lora_lightning.adapters.low_rank import dropped_product, keep_mask


def squared_row_norms(weight: Tensor) -> Tensor:
    """|W_j|^2 of each row, (d_out,), in float32 at least.

    Summed in float64 before it is rounded: layouts, devices and thread counts sum in different orders, and the start
    is exact only while they all find the same number.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    return weight.to(dtype).square().sum(dim=-1, dtype=wide).to(dtype)


def squared_direction_norms(weight: Tensor, squares: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """|W_j + s (B A)_j|^2 of each row, (d_out,), from `squares` = |W_j|^2; nothing of the size of W is made.

    Costs d_out d_in r products and d_out r numbers. Rounding may leave a small negative number where V_j vanishes.
    """
    cross = (2 * scaling) * (weight @ A.mT) + (scaling * scaling) * (B @ (A @ A.mT))
    return squares + (cross * B).sum(dim=-1)


def ratio(magnitude: Tensor, squares: Tensor) -> Tensor:
    """Ratio c = m / n for n = sqrt(squares), 1 where a row has no norm; (d_out,)."""
    has_norm = squares > 0
    # replaced before the root, whose slope at zero is infinite and would turn a masked gradient into NaN
    norm = torch.where(has_norm, squares, 1.0).sqrt()
    return torch.where(has_norm, magnitude / norm, 1.0)


def decomposed_ratio(
    weight: Tensor,
    squares: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    detach_norm: bool,
) -> Tensor:
    """Ratio c = m / |W + s B A|, (d_out,), in the dtype of `squares`; with `detach_norm` a function of m alone."""
    dtype = squares.dtype
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_norm):
        squares = squared_direction_norms(weight.to(dtype), squares, lora_A.to(dtype), lora_B.to(dtype), scaling)
    return ratio(magnitude.to(dtype), squares)


def decomposed_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, c: Tensor, scaling: float) -> Tensor:
    """c (W + s B A), (d_out, d_in), in the dtype of c."""
    dtype = c.dtype
    with torch.autocast(weight.device.type, enabled=False):
        return c[..., None] * plus_product(weight.to(dtype), lora_B.to(dtype), lora_A.to(dtype), scaling)


def scale_output(base: BaseLayer, y: Tensor, product: Tensor, c: Tensor) -> Tensor:
    """Sum y + (c - 1) * product, c (d_out,) along the outputs of the layer."""
    # c - 1 before it is rounded to y's dtype: bfloat16 would keep nothing of a c near 1
    return torch.addcmul(y, product, base.per_output((c - 1).to(y.dtype)))


def without_bias(base: BaseLayer, y: Tensor) -> Tensor:
    """The product in y = base(x), for which c is meant."""
    return y if base.bias is None else y - base.per_output(base.bias.to(y.dtype))


def add_decomposed(
    base: BaseLayer, x: Tensor, lora_A: Tensor, lora_B: Tensor, c: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """b + x W^T + (c - 1) x~ W^T + c s x~ A^T B^T, without forming a weight.

    Args:
        base: any kind of layer.
        x: (..., d_in), or token ids for an embedding.
        lora_A: (rank, d_in).
        lora_B: (d_out, rank).
        c: (d_out,), folded into B rather than into something of the size of the output.
        scaling: s.
        dropout: probability of dropping entries of x~, one mask for both of its terms; 0 outside training.
    """
    dtype = base.dtype if base.kind == "embedding" else x.dtype
    A, cB = lora_A.to(dtype), (c[..., None] * lora_B).to(dtype)
    y = base(x)
    if dropout and base.kind == "linear":
        mask, grow = keep_mask(x, dropout), 1.0 / (1.0 - dropout)
        y = scale_output(base, y, base.apply(x * mask * grow, base.weight()), c)
        return dropped_product(y, x, mask, A, cB, scaling * grow)
    if dropout:
        x = F.dropout(x, dropout)
        product = base.apply(x, base.weight())
    else:
        product = without_bias(base, y)
    return base.up(base.down(x, A), cB, onto=scale_output(base, y, product, c), scale=scaling)
