"""MoRAAdapter: a square matrix on one layer; the equations and symbols stand in `functional.py`.

Departs from the paper: the side of the matrix is at most the layer's smaller side, so that every row of it trains.
Convolutions, through the formed update, and stacked experts are adapted as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from ll_mora.functional import MAPS, fitted, owners, rotated, sources, width
from lora_lightning.adapters.base import Adapter, check_dropout, write_values, write_zeros
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import SettingsError


class MoRAAdapter(Adapter):
    """A square matrix between a map that compresses inputs and one that decompresses outputs.

    Args:
        base: the layer.
        rank: rank of the LoRA with as many numbers.
        maps: "rotation", or one of `functional.MAPS`.
        all_maps: whether stages of a cascade go through all four of these, instead of two in turn.
        dropout: probability of dropping entries of the update's input while training.

    Raises:
        SettingsError: token ids as input; a side of 1 under rotations; dropout where no input passes.
    """

    additive = True
    inputs: Tensor | None
    outputs: Tensor | None

    def __init__(self, base: BaseLayer, rank: int, maps: str, *, all_maps: bool, dropout: float) -> None:
        super().__init__()
        check_dropout(base, dropout)
        self.maps, self.all_maps, self.dropout, self.d_in, self.d_out = maps, all_maps, dropout, base.d_in, base.d_out
        k = width(base.d_in, base.d_out, rank, even=maps == "rotation")
        if base.kind == "embedding" or not k:
            what = "rotations turn pairs of entries, and the layer's smaller side has one alone; take maps=modulo there"
            shared = "the tokens of an embedding would share entries, so that those that the data lacks would move"
            raise SettingsError(f'maps is "{maps}"; {what if not k else shared}, or exclude it.')
        self.square, shares = nn.Parameter(base.zeros(k, k)), maps != "rotation"
        table = torch.zeros(-(-base.d_in // k), k, dtype=torch.int64, device=base.device)
        self.register_buffer("inputs", table if shares else None)
        self.register_buffer("outputs", table.new_zeros(base.d_out) if shares else None)

    def reset(self, generator: torch.Generator) -> None:  # noqa: ARG002 - nothing here is random
        """The matrix at zero, the maps those of the settings."""
        write_zeros(self.square)
        self.begin_stage(0)

    def begin_stage(self, stage: int) -> None:
        """Take the maps of a stage; what has been folded under one kind of maps has but the rank of one matrix."""
        if self.inputs is None or self.outputs is None:
            return
        at = list(MAPS).index(self.maps)
        at = (at + stage) % len(MAPS) if self.all_maps else at ^ stage % 2
        of_inputs, of_outputs = list(MAPS.values())[at]
        write_values(self.inputs, sources(self.d_in, self.square.shape[-1], of_inputs))
        write_values(self.outputs, owners(self.d_out, self.square.shape[-1], of_outputs))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + decompress(M compress(drop(x)))."""
        y, square = base(x), self.square.to(x.dtype)
        x = F.dropout(x, self.dropout) if self.training and self.dropout else x
        update = base.apply(x, self._weight(square)) if base.kind == "conv" else self._branch(x, square)
        return y + update.to(y.dtype)

    def _branch(self, x: Tensor, square: Tensor) -> Tensor:
        """What the output gains, (..., d_out), for x (..., d_in)."""
        if self.inputs is not None and self.outputs is not None:
            z: Tensor = F.pad(x, (0, 1)).index_select(-1, self.inputs.flatten()).unflatten(-1, self.inputs.shape)
            return (z.sum(-2) @ square.mT).index_select(-1, self.outputs)
        # of blocks beyond the outputs nothing would be left
        z = rotated(x, square.shape[-1], blocks=-(-min(self.d_in, self.d_out) // square.shape[-1]))
        return fitted((z @ (square if square.dim() == 2 else square.unsqueeze(-3)).mT).flatten(-2), self.d_out)

    def _weight(self, square: Tensor) -> Tensor:
        """What the weight gains, (*lead, d_out, d_in): the branch of the identity."""
        return self._branch(torch.eye(self.d_in, dtype=square.dtype, device=square.device), square).mT

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + decompress M compress."""
        return weight + self._weight(self.square.to(weight.dtype))

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(M compress, decompress) of rank k; None for rotations, whose update has more."""
        if self.outputs is None:
            return None
        k, update = self.square.shape[-1], self._weight(self.square.detach())
        # each entry's own output, of which there is one at least, has its row of M compress
        first = [int((self.outputs == j).nonzero()[0]) for j in range(k)]
        B = F.one_hot(self.outputs, k).to(update.dtype)
        return update[..., first, :], B.expand(*update.shape[:-2], self.d_out, k)

    def extra_repr(self) -> str:
        """The matrix's side and the maps of the settings for `print(model)`."""
        return f"side={self.square.shape[-1]}, maps={self.maps}"
