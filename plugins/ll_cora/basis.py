"""A common basis of the outputs of a layer: leading left directions of what several sources say of it.

adapters    C_k = B_k, or B_k (A_k A_k^T)^(1/2) for the update itself
models      C_k = W_k - W
nothing     C   = W, the weight's own directions
basis       U_r, eigenvectors of sum_k C_k C_k^T, largest first: left singular vectors of [C_1 ... C_K]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import SettingsError
from lora_lightning.storage.fine_tunes import FineTunes


def left_basis(columns: Sequence[Tensor], rank: int) -> Tensor:
    """Orthonormal columns (*lead, d_out, rank): leading left singular vectors of all `columns` side by side.

    The largest entry of each is positive.

    Args:
        columns: each (*lead, d_out, n), in float64.
        rank: number of directions.

    Raises:
        SettingsError: there are fewer directions.
    """
    gram = torch.stack([C @ C.mT for C in columns]).sum(0)
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(-1), vectors.flip(-1)
    found = int((values > 1e-12 * values[..., :1]).sum(-1).min())
    if found < rank:
        raise SettingsError(f"rank is {rank}, and its sources have {found} directions in common; take at most that.")
    U: Tensor = vectors[..., :rank]
    signs: Tensor = U.gather(-2, U.abs().argmax(-2, keepdim=True)).sign()
    return U * signs


def columns_of(path: str, layer: BaseLayer, tunes: FineTunes | None, by: Literal["B", "update"]) -> list[Tensor]:
    """What the sources say of a layer, or its own weight where there are none.

    Raises:
        SettingsError: no source changes the layer.
    """
    if tunes is None:
        return [layer.weight(torch.float64)]
    factors = [B if by == "B" else B @ _root(A @ A.mT) for A, B in tunes.factors(path)]
    found = [C.to(layer.device) for C in factors] + tunes.differences(path)
    if not found:
        raise SettingsError("none of its sources changes it; exclude it, or give others.")
    return found


def _root(gram: Tensor) -> Tensor:
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    return root


def checked(basis: Tensor | None, d_out: int, rank: int) -> Tensor:
    """The first `rank` columns of a layer's basis as a file has it.

    Raises:
        SettingsError: the file has none, or one of another shape.
    """
    shape = None if basis is None else tuple(basis.shape)
    if basis is None or basis.shape[-2] != d_out or basis.shape[-1] < rank:
        has = "nothing for it" if shape is None else f"shape {shape}"
        raise SettingsError(f"the file of the basis has {has}; it must have {d_out} rows and {rank} columns at least.")
    return basis[..., :rank]
