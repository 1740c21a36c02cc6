"""JoinedPair: the pairs of other layers (`Adapter.peers`) act beside a layer's own, as one product.

    y = W x + s [B, B_1, ...] [A; A_1; ...] x

The tensors stay where they are, with the layers that own them, and are read at each call.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lora_lightning.adapters.base import FactorPair
from lora_lightning.adapters.layers.base import BaseLayer, plus_product
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.adapters.pair import PairAdapter


class JoinedPair(PairAdapter):
    """A pair of factors to which those of `peers` are joined.

    Args:
        base: the layer.
        rank: inner width of the own pair.
        scaling: s of the own pair; those of peers keep theirs.
        dropout: probability of dropping entries of the updates' input while training; one mask for all of them.
        joins: whether there may be peers, all of this class.
    """

    additive = True

    def __init__(self, base: BaseLayer, *, rank: int, scaling: float, dropout: float, joins: bool) -> None:
        super().__init__()
        self.hold_pair(base, rank=rank, scaling=scaling, dropout=dropout)
        self.reads_peers = joins

    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the own pair and all peers, (*lead, R, d_in) and (*lead, d_out, R); differentiable."""
        pairs = [self, *(cast(JoinedPair, peer) for peer in self.peers)]
        if len(pairs) == 1:
            return self.lora_A, self.lora_B
        device, s = self.lora_A.device, self.scaling
        A = [pair.lora_A.to(device) for pair in pairs]
        B = [(p.lora_B if p.scaling == s else p.lora_B * (p.scaling / s)).to(device) for p in pairs]
        return torch.cat(A, dim=-2), torch.cat(B, dim=-1)

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + s sum_k B_k (A_k drop(x))."""
        return add_low_rank(base, x, *self.side_by_side(), self.scaling, self.dropout if self.training else 0.0)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s sum_k B_k A_k."""
        A, B = self.side_by_side()
        return plus_product(weight, B.to(weight.dtype), A.to(weight.dtype), self.scaling)

    def stated_pair(self) -> FactorPair:
        """All pairs as one, of no more rank than the layer is wide."""
        A, B = (factor.detach() for factor in self.side_by_side())
        if A.shape[-2] > min(A.shape[-1], B.shape[-2]):
            A, B = narrowest(A, B)
        return FactorPair("", A, B, self.scaling)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(A, s B) of all pairs as one."""
        pair = self.stated_pair()
        return pair.lora_A, pair.scaling * pair.lora_B


def narrowest(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """B A as a product through the narrower side of the layer: one factor is the identity."""
    product = B @ A
    size = min(product.shape[-2:])
    eye = torch.eye(size, dtype=product.dtype, device=product.device).expand(*product.shape[:-2], size, size)
    return (eye.contiguous(), product) if product.shape[-1] == size else (product, eye.contiguous())
