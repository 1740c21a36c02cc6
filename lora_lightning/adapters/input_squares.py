"""How large each input of a layer is, and a pair of factors that sums it while it trains.

y = base(x) + s B (A x),   W' = W + s B A,   beside the sums over tokens of x_j^2 since the last optimizer step
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_lightning.adapters.base import RunningSum
from lora_lightning.adapters.layers.base import BaseLayer, plus_product
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.adapters.pair import PairAdapter
from lora_lightning.errors import SettingsError

SQUARES = "squares"
"""Name of the statistic."""


def input_squares(base: BaseLayer, x: Tensor) -> tuple[Tensor, int]:
    """Sum over tokens of the squares of each input that A is multiplied with, (d_in,) in float32, and their number.

    Of a convolution the inputs are the entries of patches, of an embedding how often each token comes.

    Args:
        base: the layer, of any kind but stacked experts.
        x: what it is called with.
    """
    with torch.autocast(x.device.type, enabled=False):
        if base.kind == "embedding":
            ids = x.detach().reshape(-1)
            ones = torch.ones(ids.shape, device=x.device)
            return torch.zeros(base.d_in, device=x.device).index_add(0, ids, ones), ids.numel()
        squares = x.detach().float().square()
        if base.kind == "conv":
            squares = base.down(squares, torch.eye(base.d_in, device=x.device))
        rows = squares.reshape(-1, squares.shape[-1])
        return rows.sum(0), rows.shape[0]


class WatchedPair(PairAdapter):
    """A pair of factors, and the squares of its inputs since the last optimizer step.

    Args:
        base: the layer.
        rank: inner width of the update.
        scaling: s.
        dropout: probability of dropping entries of the branch's input while training.

    Raises:
        SettingsError: stacked experts, which take their update as a weight, so that no input is seen.
    """

    additive = True

    def __init__(self, base: BaseLayer, *, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        if base.kind == "experts":
            raise SettingsError(
                "stacked experts take their update as a weight, without its input, whose norm decides what is pruned; "
                "exclude them."
            )
        self.hold_pair(base, rank=rank, scaling=scaling, dropout=dropout)
        self.squares = RunningSum()

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + s B (A drop(x))."""
        if self.training:
            self.squares.add(*input_squares(base, x))
        return add_low_rank(base, x, self.lora_A, self.lora_B, self.scaling, self.dropout if self.training else 0.0)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s B A."""
        return plus_product(weight, self.lora_B.to(weight.dtype), self.lora_A.to(weight.dtype), self.scaling)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(A, s B)."""
        return self.scaled_factors()

    def statistics(self) -> Mapping[str, RunningSum]:
        """Squares of inputs."""
        return {SQUARES: self.squares}
