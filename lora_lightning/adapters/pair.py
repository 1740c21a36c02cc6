"""PairAdapter: the two factors of a low-rank update B A, which most methods hold, start, list and print alike.

A   lora_A    (*lead, rank, d_in)     starts at U(-1/sqrt(d_in), 1/sqrt(d_in))
B   lora_B    (*lead, d_out, rank)    starts at zero
s   scaling   a number

A method adds its mathematics: `forward` and `merged_weight`, further tensors, and how these start (`reset_others`).

Where the pair is given a start with s B0 A0 != 0 (`hold_start`), that product is taken off again:

    y = base(x) + (s B A x - s B0 A0 x),      W' = W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]

The weight itself is never written, so that it can be shared, quantized or sharded. At the start both products are the
same numbers, and their difference is exactly zero before the base is added.
"""

from __future__ import annotations

from typing import ClassVar, Literal

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
from lora_lightning.adapters.layers.base import BaseLayer, plus_product
from lora_lightning.adapters.starts import Factors
from lora_lightning.errors import SettingsError

Side = Literal["both", "A", "B"]
Start = Literal["kaiming", "gaussian"]


class PairAdapter(Adapter):
    """An adapter around one pair of factors; abstract. A subclass calls `hold_pair` where it makes its tensors.

    One that `takes_start` computes with `factors()`, or with `start_A` and `start_B`, wherever it computes with the
    update, so that a start is taken off.

    Attributes:
        takes_start: whether the pair can be given a start.
        start_A: A0 (*lead, rank, d_in), a buffer; None where nothing is taken off.
        start_B: B0 (*lead, d_out, rank), likewise.
        rank: inner width of the update; 0 where the adapter was built without factors, which are None then.
        scaling: s.
        dropout: probability of dropping entries of the update's input while training.
        shown: what `print(model)` says of the adapter.
    """

    takes_start: ClassVar[bool] = False
    lora_A: Tensor
    lora_B: Tensor
    start_A: Tensor | None
    start_B: Tensor | None
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
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    def _hold(self, name: str, value: Tensor | None, trains: bool) -> None:
        if trains:
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def freeze_side(self, side: Literal["A", "B"]) -> None:
        """Make one factor a buffer, which starts at random; the other one trains and starts at zero.

        Raises:
            SettingsError: there are not two factors that train.
        """
        frozen = getattr(self, f"lora_{side}")
        if not self.rank or not all(isinstance(f, nn.Parameter) for f in (self.lora_A, self.lora_B)):
            raise SettingsError("there are no two factors that train, of which one could be frozen.")
        del self._parameters[f"lora_{side}"]
        self.register_buffer(f"lora_{side}", frozen.detach())
        self.zero_A = side == "B"

    def hold_start(self) -> None:
        """Make room for a start whose product is taken off; `start_at` gives its values.

        Raises:
            SettingsError: the adapter has no factors.
        """
        if not self.rank:
            raise SettingsError("there are no factors that could start anywhere; leave init out.")
        self.register_buffer("start_A", torch.zeros_like(self.lora_A, requires_grad=False))
        self.register_buffer("start_B", torch.zeros_like(self.lora_B, requires_grad=False))
        self.shown += ", start taken off"

    def start_at(self, factors: Factors) -> None:
        """Start at these factors, which are taken off from now on where there is room for them.

        Raises:
            SettingsError: values that are not finite, or of another shape than the factors.
        """
        for name, value in (("A", factors.A), ("B", factors.B)):
            if value is None:
                continue
            target: Tensor = getattr(self, f"lora_{name}")
            if value.shape != target.shape:
                raise SettingsError(f"the start of factor {name} is {tuple(value.shape)}; it is {tuple(target.shape)}.")
            if not bool(torch.isfinite(value).all()):
                raise SettingsError(f"the start of factor {name} holds values that are not finite.")
            start: Tensor | None = getattr(self, f"start_{name}")
            for tensor in (target, start):
                if tensor is not None:
                    write_values(tensor, value)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) whose product times s is the update: with a start ([A; A0], [B, -B0]), of twice the rank."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        A0, B0 = self.start_A.to(self.lora_A.dtype), self.start_B.to(self.lora_B.dtype)
        return torch.cat([self.lora_A, A0], dim=-2), torch.cat([self.lora_B, -B0], dim=-1)

    def reset(self, generator: torch.Generator) -> None:
        """Start values: of the pair, then of what the method has beside it.

        A pair whose start is taken off goes back there, so that its update is exactly zero.
        """
        if self.start_A is not None and self.start_B is not None:
            write_values(self.lora_A, self.start_A)
            write_values(self.lora_B, self.start_B)
        elif self.rank:
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

    def plus_pair(self, weight: Tensor, A: Tensor) -> Tensor:
        """W + s B A, or W + (s B A - s B0 A0) where a start is taken off, in the dtype of W.

        Args:
            weight: W (*lead, d_out, d_in).
            A: the first factor, as far as it counts.
        """
        A, B = A.to(weight.dtype), self.lora_B.to(weight.dtype)
        if self.start_A is None or self.start_B is None:
            return plus_product(weight, B, A, self.scaling)
        return weight + self.scaling * (B @ A - self.start_B.to(weight.dtype) @ self.start_A.to(weight.dtype))

    def scaled_factors(self) -> tuple[Tensor, Tensor]:
        """Detached (A, s B), whose product is the update; removed rank components are left out."""
        A, B = self.factors()
        A, B = A.detach(), self.scaling * B.detach()
        if self.rank_mask is None:
            return A, B
        kept = torch.cat([self.rank_mask, self.rank_mask.new_ones(A.shape[-2] - self.rank)])
        return A[..., kept, :], B[..., kept]

    def stated_pair(self) -> FactorPair | None:
        """As every adapter's; a start that is taken off is a part of it."""
        pair = super().stated_pair()
        if pair is None or self.start_A is None or self.start_B is None:
            return pair
        A, B = torch.cat([pair.lora_A, self.start_A], dim=-2), torch.cat([pair.lora_B, -self.start_B], dim=-1)
        return FactorPair(pair.name, A, B, pair.scaling)

    def factor_pairs(self) -> tuple[FactorPair, ...]:
        """The one pair; none where the adapter was built without."""
        return (FactorPair("", self.lora_A, self.lora_B, self.scaling),) if self.rank else ()

    def extra_repr(self) -> str:
        """What is worth knowing in `print(model)`."""
        return self.shown
