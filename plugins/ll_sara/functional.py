"""SaRA's equations, of entries that core's `EntriesAdapter` holds.

Hu et al., 2024, arXiv:2409.06633.

    M = |P0| < theta,   P = P0 outside M and p on M,   y = P x + b
    loss + lambda sum_l |P_l * M_l|_*,   subgradient (U V^T) * M of the singular vectors of P_l * M_l
    once on the way:   M <- M * (|P| < theta); what leaves M keeps its value

    paper  here      shape
    P0     weight    (d_out, d_in)   frozen
    M      indices   (n,)            places in the flattened weight, ascending; their number is fixed
    p      values    (n,)            trained, start at P0
    -      live      (n,)            False where an entry has left M
    -      held      (n,)            the value that it keeps
    theta  limit     ()

Departs from the paper: tensors keep their size when M shrinks. Weights of adapted layers alone have entries; norms and
biases have none. Convolutions, embeddings and stacked experts (one matrix) work alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.weight_entries import EntriesAdapter
from lora_lightning.distributed import whole


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Sum of singular values of (*lead, m, n), over all matrices; the gradient is U V^T of those that are not zero."""
    U, S, Vh = torch.linalg.svd(matrix.detach(), full_matrices=False)
    rounding = torch.finfo(S.dtype).eps * max(matrix.shape[-2:]) * S.amax(-1, keepdim=True)
    G = (U * (rounding < S).unsqueeze(-2)) @ Vh
    norm: Tensor = (G * matrix).sum()
    return norm


def norms(adapters: Iterable[Adapter]) -> Tensor:
    """Sum over layers of |P * M|_*, of the entries that train."""
    found = []
    for adapter in adapters:
        own = cast(EntriesAdapter, adapter)
        found.append(nuclear_norm(own.placed(torch.where(own.live, whole(own.values), 0.0))))
    return torch.stack([norm.to(found[0].device) for norm in found]).sum()
