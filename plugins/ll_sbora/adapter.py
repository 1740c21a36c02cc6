"""SBoRAAdapter: a trained factor on columns or rows of a weight that are drawn once.

Po et al., 2024, arXiv:2407.05413. I holds r distinct positions, e_i is a standard basis vector.

    FA   A = [e_i for i in I]^T       y = W x + s B x[I]               W'[:, I] = W[:, I] + s B
    FB   B = [e_i for i in I]         y = W x,  y[I] += s A x          W'[I, :] = W[I, :] + s A

    paper  here        shape (out, in as nn.Linear stores it)
    W0     weight      (d_out, d_in)   frozen
    I      index       (rank,)         drawn by seed and path, saved
    A      lora_A      (rank, d_in)    trained and zero at the start in FB; never formed in FA
    B      lora_B      (d_out, rank)   trained and zero at the start in FA; never formed in FB
    s      scaling     alpha / rank

Stacked experts have an I each. Of convolutions a column is one weight of each kernel and a row is one kernel.

Departs from the paper: dropout acts on the selected inputs alone, which is the same in distribution. Convolutions,
stacked experts and, in FB, embeddings are adapted as well.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from lora_lightning.adapters.base import Adapter, check_dropout, check_rank, write_values, write_zeros
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import SettingsError


def selection(index: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The basis vectors of `index` (*lead, rank) as rows, (*lead, rank, width)."""
    return (index[..., None] == torch.arange(width, device=index.device)).to(dtype)


class SBoRAAdapter(Adapter):
    """One trained factor and the positions that the other one selects.

    Args:
        base: the layer.
        rank: number of columns or rows, at most the smaller side of the weight.
        scaling: s.
        fixed: the factor that selects.
        dropout: probability of dropping entries of the update's input while training.

    Raises:
        SettingsError: rank above the layer's size; dropout where no input passes; columns of an embedding.
    """

    additive = True
    index: Tensor

    def __init__(
        self, base: BaseLayer, *, rank: int, scaling: float, fixed: Literal["A", "B"] = "A", dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_rank(base, rank)
        check_dropout(base, dropout)
        if base.kind == "embedding" and fixed == "A":
            raise SettingsError(
                'fixed is "A"; the columns of an embedding are its tokens, of which few would train, drawn at random. '
                'Take "B" there, or exclude it.'
            )
        self.rank, self.scaling, self.fixed, self.dropout = rank, scaling, fixed, dropout
        self.selects = base.d_in if fixed == "A" else base.d_out
        self.trained = "lora_B" if fixed == "A" else "lora_A"
        size = (base.d_out, rank) if fixed == "A" else (rank, base.d_in)
        self.register_parameter(self.trained, nn.Parameter(base.zeros(*size)))
        self.register_buffer("index", base.zeros(rank).long())

    @property
    def factor(self) -> Tensor:
        """What trains: B (*lead, d_out, rank) in FA, A (*lead, rank, d_in) in FB."""
        return self.get_parameter(self.trained)

    def reset(self, generator: torch.Generator) -> None:
        """The trained factor at zero; distinct positions, of each expert its own."""
        stacks = self.index.view(-1, self.rank).shape[0]
        draws = [
            torch.randperm(self.selects, generator=generator, device=generator.device)[: self.rank]
            for _ in range(stacks)
        ]
        write_values(self.index, torch.stack(draws).view(self.index.shape))
        write_zeros(self.factor)

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) with the update on it."""
        y = base(x)
        factor = self.factor.to(base.dtype if base.kind == "embedding" else x.dtype)
        dropout = self.dropout if self.training else 0.0
        if self.fixed == "A":
            return base.up(self._selected(x, base, dropout), factor, onto=y, scale=self.scaling)
        h = base.down(F.dropout(x, dropout) if dropout else x, factor)
        if base.kind == "conv":  # an output of a grouped one has the inputs of its own group
            return base.up(h, selection(self.index, self.selects, h.dtype).mT, onto=y, scale=self.scaling)
        h = (self.scaling * h).to(y.dtype)
        if base.kind == "experts":
            return y.scatter_add(-1, self.index[:, None].expand_as(h), h)
        return y.index_add(-1, self.index, h)

    def _selected(self, x: Tensor, base: BaseLayer, dropout: float) -> Tensor:
        """x[I] after dropout, with the rank axis last."""
        if base.kind == "conv":
            return base.down(F.dropout(x, dropout) if dropout else x, selection(self.index, self.selects, x.dtype))
        if base.kind == "experts":
            return x.gather(-1, self.index[:, None].expand(*x.shape[:-1], self.rank))
        h = x.index_select(-1, self.index)
        return F.dropout(h, dropout) if dropout else h

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W with s B on the columns I, or s A on the rows I; the others are the same numbers."""
        update = self.scaling * self.factor.to(weight.dtype)
        axis = -1 if self.fixed == "A" else -2
        return weight.scatter_add(axis, self.index.unsqueeze(-3 - axis).expand_as(update), update)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(A, s B) with the selecting factor written out."""
        factor = self.scaling * self.factor.detach()
        chosen = selection(self.index, self.selects, factor.dtype)
        return (chosen, factor) if self.fixed == "A" else (factor, chosen.mT)

    def extra_repr(self) -> str:
        """Rank, scaling and the fixed factor for `print(model)`."""
        return f"rank={self.rank}, scaling={self.scaling:g}, fixed={self.fixed}"
