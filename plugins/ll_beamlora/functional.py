"""The weights of BeamLoRA's rank components, and what a report says of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.weighted import Components, WeightedAdapter


def beam_weights(gate: Tensor, temperature: float) -> Tensor:
    """Weights r softmax(g / tau) of g (..., r); their mean is 1."""
    return gate.shape[-1] * torch.softmax(gate / temperature, dim=-1)


def in_a_beam(temperature: float) -> Components:
    """Components whose weights compete in a softmax, and which may be overwritten."""
    return Components("rewritten", weights=partial(beam_weights, temperature=temperature))


def extremes(adapters: Mapping[str, Adapter]) -> dict[str, list[float]]:
    """[smallest, largest] weight by layer."""
    found = {path: cast(WeightedAdapter, adapter).rank_weights().detach() for path, adapter in adapters.items()}
    return {path: [float(weights.min()), float(weights.max())] for path, weights in found.items()}
