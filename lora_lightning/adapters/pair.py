"""PairAdapter: the two factors of a low-rank update B A, which most methods hold, start, list and print alike.

A   lora_A    (*lead, rank, d_in)     starts at U(-1/sqrt(d_in), 1/sqrt(d_in))
B   lora_B    (*lead, d_out, rank)    starts at zero
s   scaling   a number

A method adds its mathematics: `forward` and `merged_weight`, further tensors, and how these start (`reset_others`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import (
    Adapter,
    FactorPair,
    check_dropout,
    write_uniform,
    write_values,
    write_zeros,
)
from lora_lightning.adapters.layers.base import BaseLayer

Side = Literal["both", "A", "B"]
Start = Literal["kaiming", "gaussian"]


class PairAdapter(Adapter):
    """An adapter around one pair of factors; abstract. A subclass calls `hold_pair` where it makes its tensors.

    Attributes:
        rank: inner width of the update; 0 where the adapter was built without factors, which are None then.
        scaling: s.
        dropout: probability of dropping entries of the update's input while training.
        shown: what `print(model)` says of the adapter.
    """

    lora_A: Tensor
    lora_B: Tensor
    rank: int
    scaling: float
    dropout: float
    shown: str

    def hold_pair(
        self,
        base: BaseLayer,
        *,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        train: Side = "both",
        start: Start = "kaiming",
        lead: tuple[int, ...] = (),
    ) -> None:
        """Make the factors; `reset` gives them their values.

        Args:
            base: the layer.
            rank: inner width of the update; 0 for no factors.
            scaling: s.
            dropout: probability of dropping entries of the update's input while training.
            train: which side trains; the other is a buffer. The side that starts at zero is a trained one.
            start: distribution of the side that does not start at zero.
            lead: leading axes of the factors, beside those of the layer.

        Raises:
            SettingsError: dropout where no input passes through the adapter.
        """
        check_dropout(base, dropout)
        self.rank, self.scaling, self.dropout, self.start = rank, scaling, dropout, start
        self.shown = f"rank={rank}, scaling={scaling:g}"
        # token rows: the small side (d_out, rank) is the random one, so that an unseen token keeps its vector
        self.zero_A = train == "A" or (train == "both" and base.kind == "embedding")
        self._hold("lora_A", base.zeros(*lead, rank, base.d_in) if rank else None, trains=train != "B")
        self._hold("lora_B", base.zeros(*lead, base.d_out, rank) if rank else None, trains=train != "A")

    def _hold(self, name: str, value: Tensor | None, trains: bool) -> None:
        if trains:
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def reset(self, generator: torch.Generator) -> None:
        """Start values: of the pair, then of what the method has beside it."""
        if self.rank:
            self._reset_pair(generator)
        self.reset_others(generator)

    def _reset_pair(self, generator: torch.Generator) -> None:
        """One side zero, the other U(-1/sqrt(n), 1/sqrt(n)) or N(0, 1/rank^2); n its row length."""
        zero, random = (self.lora_A, self.lora_B) if self.zero_A else (self.lora_B, self.lora_A)
        if self.start == "gaussian":
            drawn = torch.randn(random.shape, generator=generator, device=generator.device)
            write_values(random, drawn / self.rank)
        else:
            write_uniform(random, generator)
        write_zeros(zero)

    def reset_others(self, generator: torch.Generator) -> None:
        """Write start values of the tensors beside the pair."""

    def scaled_factors(self) -> tuple[Tensor, Tensor]:
        """Detached (A, s B), whose product is the update; removed rank components are left out."""
        A, B = self.lora_A.detach(), self.scaling * self.lora_B.detach()
        return (A, B) if self.rank_mask is None else (A[..., self.rank_mask, :], B[..., self.rank_mask])

    def factor_pairs(self) -> tuple[FactorPair, ...]:
        """The one pair; none where the adapter was built without."""
        return (FactorPair("", self.lora_A, self.lora_B, self.scaling),) if self.rank else ()

    def extra_repr(self) -> str:
        """What is worth knowing in `print(model)`."""
        return self.shown
