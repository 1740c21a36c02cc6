"""WeightedAdapter: a low-rank update whose rank components have weights of their own, which train.

y = base(x) + s B diag(w) A x,   W' = W + s B diag(w) A,   w = weights(gate)

A     lora_A    (*lead, rank, d_in)
B     lora_B    (*lead, d_out, rank)
w               (*lead, rank)          weights of the rank components
gate  gate      (*lead, rank)          the trained numbers that w is a function of; w itself where none is given
s     scaling   a number

A component of weight zero is removed: it is in neither the closed form nor an exported file, and it may come back while
training. The pair is none of `factor_pairs`: what stands between its factors has no part in an invertible change of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, FactorPair, GroupSpec, write_values, write_zeros
from lora_lightning.adapters.layers.base import BaseLayer, plus_product
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.adapters.pair import PairAdapter


def as_trained(gate: Tensor) -> Tensor:
    """The trained numbers as the weights."""
    return gate


def gate_at_zero(adapter: WeightedAdapter, generator: torch.Generator) -> None:  # noqa: ARG001 - nothing is drawn
    """Write zeros to the gate; the pair keeps its start."""
    write_zeros(adapter.gate)


def write_normal(target: Tensor, deviation: float, generator: torch.Generator) -> None:
    """Write N(0, deviation^2)."""
    drawn = torch.randn(target.shape, generator=generator, device=generator.device)
    write_values(target, deviation * drawn)


@dataclass(frozen=True)
class Components:
    """What the rank components of a method are.

    Attributes:
        kind: what a schedule does to them, beside their training: nothing ("free"), shrink their gate ("shrunk"), write
            zeros to it where they fall out of a budget ("budgeted"), overwrite them by others ("rewritten").
        weights: the weights (*lead, rank) as a function of the trained numbers of that shape.
        begin: writes start values of the gate, and of the pair where those of `PairAdapter` are not meant.
    """

    kind: Literal["free", "shrunk", "budgeted", "rewritten"] = "free"
    weights: Callable[[Tensor], Tensor] = as_trained
    begin: Callable[[WeightedAdapter, torch.Generator], None] = gate_at_zero


FREE = Components()
"""Weights that train from zero."""


class WeightedAdapter(PairAdapter):
    """A pair of factors with a weight for each rank component.

    The weights are multiplied into B, in the precision that it trains in, and never into activations.

    Args:
        base: the layer.
        rank: inner width of the update, at most the smaller side of the weight.
        scaling: s.
        dropout: probability of dropping entries of the branch's input while training.
        components: what they are.

    Raises:
        SettingsError: dropout where no input passes through the adapter.
    """

    additive = True

    def __init__(
        self,
        base: BaseLayer,
        *,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        components: Components = FREE,
    ) -> None:
        super().__init__()
        self.hold_pair(base, rank=rank, scaling=scaling, dropout=dropout)
        self.gate = nn.Parameter(base.zeros(rank))
        self.components = components

    def reset_others(self, generator: torch.Generator) -> None:
        """The gate, and what else the method begins with."""
        self.components.begin(self, generator)

    def rank_weights(self) -> Tensor:
        """Weights of the rank components, (*lead, rank)."""
        return self.components.weights(self.gate)

    def kept(self) -> Tensor:
        """Which components have a weight, (rank,); of stacked experts, in any of them."""
        used = self.rank_weights().detach() != 0
        return used.view(-1, self.rank).any(0)

    def _weighted_B(self) -> Tensor:
        """B diag(w), (*lead, d_out, rank)."""
        return self.lora_B * self.rank_weights().unsqueeze(-2)

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        """base(x) + s B diag(w) A drop(x)."""
        dropout = self.dropout if self.training else 0.0
        return add_low_rank(base, x, self.lora_A, self._weighted_B(), self.scaling, dropout)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s B diag(w) A."""
        B, A = self._weighted_B().to(weight.dtype), self.lora_A.to(weight.dtype)
        return plus_product(weight, B, A, self.scaling)

    def stated_pair(self) -> FactorPair:
        """(A, B diag(w)) of the components that have a weight, with the adapter's own scaling."""
        kept = self.kept()
        B = self._weighted_B().detach()[..., kept]
        return FactorPair("", self.lora_A.detach()[..., kept, :], B, self.scaling)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(A, s B diag(w)), removed components left out."""
        pair = self.stated_pair()
        return pair.lora_A, pair.scaling * pair.lora_B

    def own_factors(self) -> tuple[Tensor, Tensor]:
        """The trained factors, without the weights."""
        return self.lora_A, self.lora_B

    def peft_tensors(self) -> Mapping[str, Tensor]:
        """The trained weights, as peft calls them where they stand between factors."""
        return {"lora_E": self.gate}

    def factor_pairs(self) -> tuple[FactorPair, ...]:
        """None: the weights stand between the factors."""
        return ()


def weighted_groups(
    adapters: Mapping[str, Adapter], gate_ratio: float = 1.0, gate_decay: float | None = 0.0
) -> dict[str, GroupSpec]:
    """Groups "A", "B" and "gate" of weighted adapters.

    Args:
        adapters: by path; others than `WeightedAdapter` have no part in it.
        gate_ratio: rate of the gates over the optimizer's.
        gate_decay: weight decay of the gates; None for the optimizer's.
    """
    found = [adapter for adapter in adapters.values() if isinstance(adapter, WeightedAdapter)]
    gates = [adapter.gate for adapter in found]
    return {
        "A": GroupSpec(params=[adapter.get_parameter("lora_A") for adapter in found]),
        "B": GroupSpec(params=[adapter.get_parameter("lora_B") for adapter in found]),
        "gate": GroupSpec(params=gates, lr_ratio=gate_ratio, weight_decay=gate_decay),
    }


def kept_ranks(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """How many rank components have a weight: of all, in total, and layer by layer."""
    found = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, WeightedAdapter)}
    layers = {path: int(adapter.kept().sum()) for path, adapter in found.items()}
    return {
        "kept_components": sum(layers.values()),
        "components": sum(adapter.rank for adapter in found.values()),
        "ranks": layers,
    }
