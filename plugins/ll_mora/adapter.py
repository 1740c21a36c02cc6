"""MoRAAdapter: a square matrix on one layer; the equations and symbols stand in `functional.py`.

Departs from the paper: the side of the matrix is at most the layer's smaller side, so that every row of it trains.
Convolutions and stacked experts are adapted as well, with the formed update.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from ll_mora import functional
from lora_lightning.adapters.base import Adapter, check_dropout, write_values, write_zeros
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import SettingsError


class MoRAAdapter(Adapter):
    """A square matrix between a map that compresses inputs and one that decompresses outputs.

    Args:
        base: the layer.
        rank: rank of the LoRA with as many numbers.
        maps: "rotation", or one of `functional.MAPS`.
        dropout: probability of dropping entries of the update's input while training.

    Raises:
        SettingsError: token ids as input; a side of 1 under rotations; dropout where no input passes.
    """

    additive = True
    inputs: Tensor | None
    outputs: Tensor | None

    def __init__(self, base: BaseLayer, *, rank: int, maps: str, dropout: float = 0.0) -> None:
        super().__init__()
        if base.kind == "embedding":
            raise SettingsError(
                "the tokens of an embedding would share entries of one matrix, so that the vectors of tokens that the "
                "data lacks would move; exclude it."
            )
        check_dropout(base, dropout)
        self.maps, self.dropout, self.d_in, self.d_out = maps, dropout, base.d_in, base.d_out
        k = functional.width(base.d_in, base.d_out, rank, even=maps == "rotation")
        if not k:
            raise SettingsError(
                f'maps is "rotation", which turns pairs of entries; a layer of {base.d_in} inputs and {base.d_out} '
                'outputs has none. Take "modulo" there, or exclude it.'
            )
        self.square = nn.Parameter(base.zeros(k, k))
        shared = maps != "rotation"
        zeros = torch.zeros(-(-base.d_in // k) * k + base.d_out, dtype=torch.int64, device=base.device)
        self.register_buffer("inputs", zeros[: -base.d_out].view(-1, k).clone() if shared else None)
        self.register_buffer("outputs", zeros[-base.d_out :].clone() if shared else None)

    def reset(self, generator: torch.Generator) -> None:  # noqa: ARG002 - nothing here is random
        """The matrix at zero, the maps those of the settings."""
        write_zeros(self.square)
        if self.maps != "rotation":
            self.turn(self.maps)

    def turn(self, maps: str) -> None:
        """Take other maps, one of `functional.MAPS`; the update is the same where the matrix is zero."""
        if self.inputs is not None and self.outputs is not None:
            k, (of_inputs, of_outputs) = self.square.shape[-1], functional.MAPS[maps]
            write_values(self.inputs, functional.sources(self.d_in, k, of_inputs))
            write_values(self.outputs, functional.owners(self.d_out, k, of_outputs))

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + decompress(M compress(drop(x)))."""
        y = base(x)
        x = F.dropout(x, self.dropout) if self.training and self.dropout else x
        square = self.square.to(x.dtype)
        if base.kind != "linear":
            return y + base.apply(x, self._update(square)).to(y.dtype)
        if self.inputs is None or self.outputs is None:
            return y + functional.rotated_update(x, square, self.d_out).to(y.dtype)
        return y + functional.shared_update(x, square, self.inputs, self.outputs).to(y.dtype)

    def _update(self, square: Tensor) -> Tensor:
        """What the weight gains, (*lead, d_out, d_in)."""
        if self.inputs is None or self.outputs is None:
            return functional.rotated_weight(square, self.d_in, self.d_out)
        return functional.shared_rows(square, self.inputs, self.d_in).index_select(-2, self.outputs)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + decompress M compress."""
        return weight + self._update(self.square.to(weight.dtype))

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """(M compress, decompress) of rank k; None for rotations, whose update has more."""
        if self.inputs is None or self.outputs is None:
            return None
        A = functional.shared_rows(self.square.detach(), self.inputs, self.d_in)
        k = A.shape[-2]
        B = (self.outputs[:, None] == torch.arange(k, device=A.device)).to(A.dtype)
        return A, B.expand(*A.shape[:-2], self.d_out, k)

    def extra_repr(self) -> str:
        """The matrix's side and the maps for `print(model)`."""
        return f"side={self.square.shape[-1]}, maps={self.maps}"
