"""Counting RoseLoRA: surviving entries, the density of B A, and proposition 1's bound on it.

Wang et al., 2024, arXiv:2406.10777, proposition 1. With s(v) the fraction of zeros of v,

    s(BA) >= max(0, 1 - sum_i (1 - s(A_i*)) (1 - s(B_*i)))

because term i touches nnz(B_*i) nnz(A_i*) entries. Equality where the supports are disjoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lora_lightning.adapters.base import Adapter


def density_bound(A: Tensor, B: Tensor) -> float:
    """Largest fraction of non-zeros B A can have, from the supports of A (r, d_in) and B (d_out, r)."""
    kept_A = (A != 0).double().mean(dim=1)
    kept_B = (B != 0).double().mean(dim=0)
    return min(1.0, float(kept_A @ kept_B))


def density(A: Tensor, B: Tensor) -> float:
    """Fraction of entries of B A (d_out, d_in) that some rank component touches."""
    touched = (B != 0).float() @ (A != 0).float()
    return float((touched > 0).double().mean())


def survey(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """Totals over `adapters` and, layer by layer, surviving entries and density against the bound."""
    layers: dict[str, dict[str, float]] = {}
    survivors = {"A": 0, "B": 0}
    entries = {"A": 0, "B": 0}
    for path, adapter in adapters.items():
        for pair in adapter.factor_pairs():
            A, B = pair.lora_A.detach(), pair.lora_B.detach()
            for side, factor in (("A", A), ("B", B)):
                survivors[side] += int(torch.count_nonzero(factor))
                entries[side] += factor.numel()
            layers[path] = {
                "trained": A.numel() + B.numel(),
                "surviving_A": int(torch.count_nonzero(A)),
                "surviving_B": int(torch.count_nonzero(B)),
                "density": density(A, B),
                "density_bound": density_bound(A, B),
            }
    total = max(entries["A"] + entries["B"], 1)
    return {
        "surviving_A": survivors["A"],
        "surviving_B": survivors["B"],
        "entries_A": entries["A"],
        "entries_B": entries["B"],
        "sparsity": 1 - (survivors["A"] + survivors["B"]) / total,
        "density": sum(layer["density"] for layer in layers.values()) / max(len(layers), 1),
        "density_bound": sum(layer["density_bound"] for layer in layers.values()) / max(len(layers), 1),
        "layers": layers,
    }
