"""The start of AdaLoRA's triplets, and the penalty that keeps their factors orthogonal (equation 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.weighted import Components, WeightedAdapter, gate_at_zero, write_normal
from lora_lightning.distributed import whole


def start_triplets(adapter: WeightedAdapter, generator: torch.Generator) -> None:
    """Factors at N(0, 0.02^2), their weights at zero."""
    for factor in (adapter.lora_A, adapter.lora_B):
        write_normal(factor, 0.02, generator)
    gate_at_zero(adapter, generator)


TRIPLETS = Components("budgeted", begin=start_triplets)
"""A weight between a row of A and a column of B."""


def distance_from_orthogonal(adapters: Mapping[str, Adapter], squared: bool) -> Tensor:
    """Mean over all factors of |Q Q^T - I| and |P^T P - I|, or of their squares."""
    distances = []
    for adapter in cast(Mapping[str, WeightedAdapter], adapters).values():
        for rows in (whole(adapter.lora_A), whole(adapter.lora_B).mT):
            eye = torch.eye(adapter.rank, dtype=rows.dtype, device=rows.device)
            distances.append(torch.linalg.vector_norm(rows @ rows.mT - eye, dim=(-2, -1)).flatten())
    found = torch.cat(distances)
    return (found.square() if squared else found).mean()
