"""peft's ADALORA format, in the words of its LORA format: a pair of factors, and a weight for each rank component.

base_model.model.<path>.lora_A   (r, d_in)
base_model.model.<path>.lora_B   (d_out, r)
base_model.model.<path>.lora_E   (r, 1)

delta = lora_alpha / (init_r + 1e-5) * B @ (E * A)

Components that peft has removed are not in the file: `rank_pattern` says which are left, and the divisor stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TRIPLETS = "ADALORA"
WEIGHTS = "lora_E"
_SMALL = 1e-5
_DEFAULT_RANK = 12
_SCHEDULE = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "init_r")


def in_lora_terms(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the ranks that are left as `rank_pattern`; those of another format as they are."""
    if config.get("peft_type") != TRIPLETS:
        return dict(config)
    left = {
        re.escape(_layer_of(name)): sum(map(bool, kept)) for name, kept in (config.get("rank_pattern") or {}).items()
    }
    plain = {key: value for key, value in config.items() if key not in _SCHEDULE}
    return plain | {"r": config.get("init_r", _DEFAULT_RANK), "rank_pattern": left}


def _layer_of(name: str) -> str:
    """`model.layers.0.q_proj` of `model.layers.0.q_proj.lora_E`, after which the adapter's name may stand."""
    return name.rpartition(f".{WEIGHTS}")[0]


def scaling_of(config: Mapping[str, Any], alpha: float) -> float:
    """Factor on the product, whatever is left of the rank."""
    rank: int = config["r"]
    return alpha / (rank + _SMALL)


def alpha_of(scaling: float, rank: int) -> float:
    """The `alpha` with which a layer of that rank has that factor, alpha / (rank + 1e-5)."""
    return scaling * (rank + _SMALL)


def at_least_one(A: Tensor, B: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, weights (r,)); of a layer that lost all its components, one of zeros."""
    if len(A):
        return A, B, weights.flatten()
    return A.new_zeros(1, *A.shape[1:]), B.new_zeros(B.shape[0], 1), torch.zeros(1, dtype=A.dtype)
