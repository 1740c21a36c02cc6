"""Low-rank updates: the shared product and the one module that LoRA and its relatives build.

y = base(x) + s B (A x),   W' = W + s B A,   b' = b + bias_delta

A   lora_A       (rank, d_in)
B   lora_B       (d_out, rank)
s   scaling      a number
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from lora_lightning.adapters.base import EntryMask, write_zeros
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.pair import PairAdapter, Side, Start
from lora_lightning.distributed import local
from lora_lightning.errors import SettingsError

NO_BIAS = {"embedding": "an embedding", "experts": "a stack of experts"}
"""Kinds of layers that have no bias to add to, as messages call them."""

Product = Callable[[BaseLayer, Tensor, Tensor, Tensor, float, float], Tensor]
"""(base, x, A, B, s, dropout) to base(x) + s B (A drop(x)), as `add_low_rank` computes it."""


def add_low_rank(
    base: BaseLayer, x: Tensor, lora_A: Tensor, lora_B: Tensor, w: Tensor | float, dropout: float = 0.0
) -> Tensor:
    """base(x) + B (w * A drop(x)), without a second tensor of the size of the output.

    Args:
        base: any kind of layer.
        x: (..., d_in), or token ids for an embedding.
        lora_A: (rank, d_in), cast to the dtype of `x`.
        lora_B: (d_out, rank), cast likewise.
        w: weights of the rank components, (rank,) or (..., rank), or one number.
        dropout: probability with which entries of x are dropped on this branch only; 0 outside training.
    """
    dtype = factor_dtype(base, x)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    y = base(x)
    if dropout and base.kind == "linear" and not isinstance(w, Tensor):
        return dropped_product(y, x, keep_mask(x, dropout), A, B, w / (1.0 - dropout))
    h = base.down(F.dropout(x, dropout) if dropout else x, A)
    if isinstance(w, Tensor):
        return base.up(h * w.to(h.dtype), B, onto=y)
    return base.up(h, B, onto=y, scale=w)


def add_started(
    base: BaseLayer, x: Tensor, factors: Sequence[Tensor], start: Sequence[Tensor], s: float, dropout: float = 0.0
) -> Tensor:
    """base(x) + (s B A drop(x) - s B0 A0 x), exactly base(x) where A, B are A0, B0 and nothing is dropped.

    Args:
        base: any kind of layer.
        x: (..., d_in), or token ids for an embedding.
        factors: A (rank, d_in), B (d_out, rank).
        start: A0, B0, likewise.
        s: a number.
        dropout: probability with which entries of x are dropped on the trained product; 0 outside training.
    """
    dtype, y = factor_dtype(base, x), base(x)
    none = torch.zeros_like(y)
    (A, B), (A0, B0) = ([factor.to(dtype) for factor in pair] for pair in (factors, start))
    trained = base.up(base.down(F.dropout(x, dropout) if dropout else x, A), B, onto=none, scale=s)
    return y + (trained - base.up(base.down(x, A0), B0, onto=none, scale=s))


def factor_dtype(base: BaseLayer, x: Tensor) -> torch.dtype:
    """The dtype that a layer's input is multiplied with factors in."""
    return base.dtype if base.kind == "embedding" else x.dtype


def keep_mask(x: Tensor, dropout: float) -> Tensor:
    """A byte mask like `x`, 1 with probability 1 - dropout (rounded to 1/65536); four decisions a 64-bit draw."""
    n = x.numel()
    draws = torch.randint(-(2**63), 2**63 - 1, ((n + 3) // 4,), dtype=torch.int64, device=x.device)
    # 16 signed bits: a threshold of 32768 would wrap around and drop everything
    threshold = min(round((1.0 - dropout) * 65536) - 32768, 32767)
    return (draws.view(torch.int16)[:n] < threshold).view(x.shape).view(torch.uint8)


class DroppedProduct(torch.autograd.Function):
    """y + c ((x * mask) A^T) B^T keeping x itself and one byte an entry, where autograd would keep a copy of x.

    Where A is frozen not even x is kept.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, mask: Tensor, A: Tensor, B: Tensor, c: float) -> Tensor:
        """Keeps the mask, h = (x * mask) A^T, the factors, and x for the gradient of A."""
        ctx.shape, ctx.x_dtype, ctx.c = x.shape, x.dtype, c
        # a quantized layer keeps its input's dtype under autocast, and its output must come through unrounded
        ctx.dtype = dtype = torch.promote_types(autocast_dtype(x) or x.dtype, y.dtype)
        with torch.autocast(x.device.type, enabled=False):
            h = rows(x * mask).to(dtype) @ A.to(dtype).mT
            # into a tensor of the final shape: a Function that returns a view forbids in-place ops on its output
            out = torch.empty(y.shape, dtype=dtype, device=y.device)
            torch.addmm(rows(y).to(dtype), h, B.to(dtype).mT, alpha=c, out=rows(out))
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, mask, h, A, B)
        return out.to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, x, A and B."""
        x, mask, h, A, B = ctx.saved_tensors
        dx = dA = dB = None
        with torch.autocast(mask.device.type, enabled=False):
            g = rows(G).to(ctx.dtype)
            gB = g @ B.to(ctx.dtype)
            if ctx.needs_input_grad[3]:
                dA = ((gB.mT @ rows(x * mask).to(ctx.dtype)) * ctx.c).to(A.dtype)
            if ctx.needs_input_grad[4]:
                dB = ((g.mT @ h) * ctx.c).to(B.dtype)
            if ctx.needs_input_grad[1]:
                dx = (gB @ A.to(ctx.dtype)).mul_(rows(mask)).mul_(ctx.c).view(ctx.shape).to(ctx.x_dtype)
        return G if ctx.needs_input_grad[0] else None, dx, None, dA, dB, None


def dropped_product(y: Tensor, x: Tensor, mask: Tensor, A: Tensor, B: Tensor, c: float) -> Tensor:
    """y + c ((x * mask) A^T) B^T for y (..., d_out), x and mask (..., d_in), A (r, d_in), B (d_out, r)."""
    total: Tensor = DroppedProduct.apply(y, x, mask, A, B, c)  # type: ignore[no-untyped-call]
    return total


def rows(tensor: Tensor) -> Tensor:
    """(..., width) as (N, width)."""
    return tensor.reshape(-1, tensor.shape[-1])


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes products in on the device of `x`; None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class LowRankAdapter(PairAdapter):
    """A pair of factors on one layer, and what methods around it ask for.

    Args:
        base: the layer.
        rank: inner width of the update, at most the smaller side of the weight.
        scaling: s.
        dropout: probability of dropping entries of the branch's input while training.
        train: which side trains; the other is a buffer. The side that starts at zero is a trained one.
        bias: whether an additive bias (d_out,) trains as well.
        start: distribution of the side that does not start at zero.
        product: how the output is computed, where a method knows a cheaper way than `add_low_rank`.
        rank_pruning: whether rank components can be removed by a mask.
        entry_masks: whether single entries can be removed by a schedule.

    Raises:
        SettingsError: rank above the layer's size; dropout on token ids; bias on an embedding.
    """

    additive = True
    takes_start = True
    mask_A: Tensor | None
    mask_B: Tensor | None

    def __init__(
        self,
        base: BaseLayer,
        *,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        train: Side = "both",
        bias: bool = False,
        start: Start = "kaiming",
        product: Product = add_low_rank,
        rank_pruning: bool = False,
        entry_masks: bool = False,
    ) -> None:
        super().__init__()
        if bias and (what := NO_BIAS.get(base.kind)):
            raise SettingsError(f"bias is True; {what} has no bias to add to, so it must be False there.")
        self.product = product
        self.hold_pair(base, rank=rank, scaling=scaling, dropout=dropout, train=train, start=start)
        self.bias_delta = nn.Parameter(base.zeros(base.d_out)) if bias else None
        on = torch.ones(rank, dtype=torch.bool, device=base.device) if rank_pruning else None
        self.register_buffer("rank_mask", on)
        for name, factor in (("mask_A", self.lora_A), ("mask_B", self.lora_B)):
            self.register_buffer(name, torch.ones_like(factor, dtype=torch.bool) if entry_masks else None)

    def reset_others(self, generator: torch.Generator) -> None:  # noqa: ARG002 - nothing here is random
        """The bias at zero; masks keep everything."""
        if self.bias_delta is not None:
            write_zeros(self.bias_delta)
        for mask in (self.rank_mask, self.mask_A, self.mask_B):
            if mask is not None:
                mask.fill_(True)

    def _kept(self) -> Tensor:
        """lora_A without the removed rank components."""
        return self.lora_A if self.rank_mask is None else self.lora_A * self.rank_mask[:, None]

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + s B (A drop(x)) + bias_delta."""
        dropout = self.dropout if self.training else 0.0
        if self.start_A is None or self.start_B is None:
            y = self.product(base, x, self._kept(), self.lora_B, self.scaling, dropout)
        else:
            pair, start = (self._kept(), self.lora_B), (self.start_A, self.start_B)
            y = add_started(base, x, pair, start, self.scaling, dropout)
        if self.bias_delta is None:
            return y
        return y + base.per_output(self.bias_delta.to(y.dtype))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s B A, or W + (s B A - s B0 A0)."""
        return self.plus_pair(weight, self._kept())

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """Sum b + bias_delta."""
        if self.bias_delta is None:
            return bias
        return self.bias_delta if bias is None else bias + self.bias_delta

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(A, s B), removed rank components left out."""
        return self.scaled_factors()

    @torch.no_grad()
    def shrink(self, kept: float) -> bool:
        """sqrt(kept) times each factor where both train; False where a start is taken off, or a bias trains."""
        if self.start_A is not None or self.bias_delta is not None:
            return False
        trained = [factor for factor in (self.lora_A, self.lora_B) if isinstance(factor, nn.Parameter)]
        for factor in trained:
            local(factor).mul_(kept ** (1 / len(trained)))
        return True

    def rank_scores(self) -> Tensor | None:
        """|B_j| |A_j|, the norm of each rank component's product (of stacked experts' together), (rank,)."""
        if self.rank_mask is None:
            return None
        size_A = torch.linalg.vector_norm(self.lora_A.detach(), dim=-1)
        size_B = torch.linalg.vector_norm(self.lora_B.detach(), dim=-2)
        scores: Tensor = torch.linalg.vector_norm((size_A * size_B).view(-1, self.rank_mask.numel()), dim=0)
        return scores

    def masks(self) -> tuple[EntryMask, ...]:
        """Rows of A and columns of B, where the adapter was built with entry masks."""
        found = []
        for param, mask, along in ((self.lora_A, self.mask_A, -1), (self.lora_B, self.mask_B, -2)):
            if mask is not None and isinstance(param, nn.Parameter):
                found.append(EntryMask(param, mask, along, "zero"))
        return tuple(found)
