"""CoRA's module: a pair of factors whose B is a basis that a new start keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.adapters.base import write_values, write_zeros
from lora_lightning.adapters.layers.base import BaseLayer, plus_product
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.adapters.pair import PairAdapter, Side


class BasisAdapter(PairAdapter):
    """y = base(x) + s B (A x), with B a basis and A zero at each start.

    Args:
        base: the layer.
        rank: columns of the basis.
        scaling: s.
        dropout: probability of dropping entries of the branch's input while training.
        frozen: whether B is a buffer. Where it trains, the basis is kept beside it.
    """

    additive = True
    basis: Tensor | None

    def __init__(self, base: BaseLayer, *, rank: int, scaling: float, dropout: float, frozen: bool) -> None:
        super().__init__()
        train: Side = "A" if frozen else "both"
        self.hold_pair(base, rank=rank, scaling=scaling, dropout=dropout, train=train)
        self.register_buffer("basis", None if frozen else torch.zeros_like(self.lora_B.detach()))

    def hold_basis(self, basis: Tensor) -> None:
        """Write a basis (*lead, d_out, rank) into B; new starts come back to it."""
        write_values(self.lora_B, basis)
        if self.basis is not None:
            write_values(self.basis, basis)

    def reset(self, generator: torch.Generator) -> None:  # noqa: ARG002 - the start is no matter of chance
        """A at zero, and B at the basis; before `hold_basis` that is zero too."""
        write_zeros(self.lora_A)
        if self.basis is not None:
            write_values(self.lora_B, self.basis)

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + s B (A drop(x))."""
        return add_low_rank(base, x, self.lora_A, self.lora_B, self.scaling, self.dropout if self.training else 0.0)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s B A."""
        return plus_product(weight, self.lora_B.to(weight.dtype), self.lora_A.to(weight.dtype), self.scaling)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(A, s B)."""
        return self.scaled_factors()
