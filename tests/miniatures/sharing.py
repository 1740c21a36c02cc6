"""Factors that layers share: VeRA's are frozen, Tied-LoRA's train.

VeRA       Kopiczko et al., 2023, arXiv:2310.11454       W' = W + diag(b) B diag(d) A     A, B random and frozen
Tied-LoRA  Renduchintala et al., 2023, arXiv:2311.09578  W' = W + diag(u) B diag(v) A     A, B trained

    paper  here        shape
    A      lora_A      (rank, widest d_in)     one for all layers, which read the columns that they have
    B      lora_B      (widest d_out, rank)
    d, v   rank_scale  (rank,)                 a layer's own
    b, u   out_scale   (d_out,)                a layer's own; starts at 0

Departs from the papers: Tied-LoRA's u starts at 0 instead of its B, so that the shared factors are alike in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter, check_rank, write_uniform, write_values, write_zeros
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.linked import Linked
from lora_lightning.adapters.low_rank import add_low_rank
from lora_lightning.errors import SettingsError
from lora_lightning.injection.links import common_owner
from lora_lightning.methods import Adapters, Method


class SharedFactors(Linked):
    """A and B as wide as the widest layer."""

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, like: Tensor, rank: int, d_in: int, d_out: int, trains: bool) -> None:
        super().__init__()
        for name, size in (("lora_A", (rank, d_in)), ("lora_B", (d_out, rank))):
            value = torch.zeros(size, dtype=like.dtype, device=like.device)
            if trains:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def reset(self, generator: torch.Generator) -> None:
        write_uniform(self.lora_A, generator)
        write_uniform(self.lora_B, generator)


class ScaledAdapter(Adapter):
    """base(x) + b * B (d * A x), with the shared A and B."""

    additive = True

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        check_rank(base, rank)
        if base.kind == "experts":
            raise SettingsError("stacked experts have factors of their own; exclude them.")
        self.d_in, self.d_out = base.d_in, base.d_out
        self.rank_scale = nn.Parameter(torch.zeros(rank, dtype=base.adapter_dtype, device=base.device))
        self.out_scale = nn.Parameter(base.zeros(base.d_out))

    def factors(self) -> tuple[Tensor, Tensor]:
        """This layer's columns of A, and diag(b) times its rows of B."""
        shared = cast(SharedFactors, self.linked["factors"])
        return shared.lora_A[:, : self.d_in], self.out_scale[:, None] * shared.lora_B[: self.d_out]

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return add_low_rank(base, x, *self.factors(), self.rank_scale)

    def merged_weight(self, weight: Tensor) -> Tensor:
        A, B = self.factors()
        return weight + (B * self.rank_scale).to(weight.dtype) @ A.to(weight.dtype)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        A, B = self.factors()
        return A.detach(), (B * self.rank_scale).detach()

    def reset(self, generator: torch.Generator) -> None:
        write_values(self.rank_scale, torch.full_like(self.rank_scale, 0.1, device="cpu"))
        write_zeros(self.out_scale)


def share(model: nn.Module, adapters: Adapters, trains: bool) -> Mapping[str, Linked]:
    """One pair of factors for all adapters, at the innermost module around them."""
    own = [cast(ScaledAdapter, adapter) for adapter in adapters.values()]
    d_in, d_out = max(adapter.d_in for adapter in own), max(adapter.d_out for adapter in own)
    shared = SharedFactors(own[0].rank_scale.detach(), len(own[0].rank_scale), d_in, d_out, trains)
    for adapter in own:
        adapter.linked = {"factors": shared}
    return {common_owner(model, adapters): shared}


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Vectors that scale random factors, which all layers share."""

    rank: int = 2
    """Width of the shared factors."""

    def build(self, base: BaseLayer) -> Adapter:
        return ScaledAdapter(base, self.rank)

    def link(self, model: nn.Module, adapters: Adapters) -> Mapping[str, Linked]:
        return share(model, adapters, trains=False)


@dataclass(frozen=True, kw_only=True)
class TiedLoRA(Method):
    """Trained factors that all layers share, and vectors that scale them."""

    rank: int = 2
    """Width of the shared factors."""

    def build(self, base: BaseLayer) -> Adapter:
        return ScaledAdapter(base, self.rank)

    def link(self, model: nn.Module, adapters: Adapters) -> Mapping[str, Linked]:
        return share(model, adapters, trains=True)
