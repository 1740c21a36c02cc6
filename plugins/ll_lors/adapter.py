"""LoRSAdapter: a pair of factors whose product counts only where the frozen weight is not zero.

Hu et al., 2025, arXiv:2501.08582.

    M = 1[W != 0],   W' = (W + s B A) * M,   y = W' x + b

    paper  here          shape (out, in as nn.Linear stores it)
    W      weight        (d_out, d_in)   frozen, sparse
    M      -             (d_out, d_in)   read off W at each call, so never stored
    A, B   lora_A/B      (rank, d_in), (d_out, rank)   B starts at zero
    s      scaling

Gradients, G = dL/dy (N, d_out), X (N, d_in), D = G^T X:

    dX = G W'
    exact       dB = s (D * M) A^T,   dA = s B^T (D * M)
    unmasked    dB = s G^T (X A^T),   dA = s (G B)^T X       the authors', which never form D

Departs from the paper: gradients are exact unless asked otherwise, and the authors' have the factor s, which their
code leaves out. Convolutions, embeddings and stacked experts are adapted as well.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_lightning.adapters.base import check_rank
from lora_lightning.adapters.from_weight import forward_from_weight
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.low_rank import factor_dtype
from lora_lightning.adapters.pair import PairAdapter


class AlsoGradient(torch.autograd.Function):
    """y, whose gradient is that of h as well."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor) -> Tensor:  # noqa: ARG004 - the signature that autograd calls
        """y itself."""
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        """G for both."""
        return G, G


class LoRSAdapter(PairAdapter):
    """The pair, masked by the zeros of the layer's weight.

    Args:
        base: the layer.
        rank: inner width of the update, at most the smaller side of the weight.
        scaling: s.
        gradient: "exact" or "unmasked", see above.

    Raises:
        SettingsError: rank above the layer's size.
    """

    takes_start = True
    keeps_zeros = True
    replaces_weight = True

    def __init__(self, base: BaseLayer, rank: int, *, scaling: float, gradient: str) -> None:
        super().__init__()
        check_rank(base, rank)
        self.hold_pair(base, rank=rank, scaling=scaling)
        self.gradient = gradient

    def merged_weight(self, weight: Tensor) -> Tensor:
        """(W + s B A) * M; zeros of the weight stay as they are."""
        return torch.where(weight == 0, weight, self.plus_pair(weight, self.lora_A))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """The layer with that weight, which is formed again in backward."""
        if self.gradient == "exact" or not torch.is_grad_enabled():
            return forward_from_weight(base, x, self.merged_weight)
        y = forward_from_weight(base, x, lambda weight: self.merged_weight(weight).detach())
        dtype = factor_dtype(base, x)
        h = base.down(x.detach(), self.lora_A.to(dtype))
        h = base.up(h, self.lora_B.to(dtype), onto=torch.zeros_like(y, requires_grad=False), scale=self.scaling)
        return cast(Tensor, AlsoGradient.apply(y, h))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Rank, scaling and gradients for `print(model)`."""
        return f"{self.shown}, {self.gradient} gradients"
