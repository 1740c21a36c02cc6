"""The free basis of a factor pair: a canonical form of it, and the rotation that brings it closest to another pair's.

After Qu and Horvath, 2024, arXiv:2402.05966, for adapters of one frozen base model: the base fixes the basis of inputs
and outputs, and only the inner one is free, (A, B) -> (G A, B G^-1).

    canonical   B A = U S V^T;   A' = sqrt(S) V^T,   B' = U sqrt(S);   of each column of U the largest entry is positive
    align       G = argmin |A_ref - G A|_F over orthogonal G = P Q^T,   A_ref A^T = P S Q^T;   A' = G A,   B' = B G^T
                and, with side "both", of |A_ref - G A|^2 + |B_ref - B G^T|^2, from A_ref A^T + B_ref^T B

    here   shape
    A      (*lead, rank, d_in)
    B      (*lead, d_out, rank)

Departs from the paper: it permutes hidden units of networks that were trained apart, which adapters of one base do not
need.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lora_lightning.adapters.spectrum import factored_svd
from lora_lightning.errors import SettingsError

Factors = tuple[Tensor, Tensor]
"""A and B."""
Side = Literal["A", "both"]


@torch.no_grad()
def canonical(A: Tensor, B: Tensor) -> Factors:
    """Balanced factors of the same product, largest component first, computed in float64; shapes and dtypes stay.

    Unique where its singular values differ. A rank beyond the product's is filled with zeros.
    """
    U, S, Vh = factored_svd(A.double(), B.double())
    signs = torch.gather(U, -2, U.abs().argmax(-2, keepdim=True)).sign()
    root = S.sqrt()
    balanced_A, balanced_B = root[..., None] * signs.mT * Vh, U * signs * root[..., None, :]
    missing = A.shape[-2] - S.shape[-1]
    if missing:
        balanced_A = torch.nn.functional.pad(balanced_A, (0, 0, 0, missing))
        balanced_B = torch.nn.functional.pad(balanced_B, (0, missing))
    return balanced_A.to(A.dtype), balanced_B.to(B.dtype)


@torch.no_grad()
def align(A: Tensor, B: Tensor, reference: Factors, side: Side = "A") -> Factors:
    """The pair in the inner basis in which it is closest to the reference, computed in float64; its product stays.

    Raises:
        SettingsError: pairs of other shapes, which have no common inner basis, or a side that is none.
    """
    ref_A, ref_B = (factor.to(A.device, torch.float64) for factor in reference)
    if ref_A.shape != A.shape or ref_B.shape != B.shape:
        shapes = [" and ".join(str(tuple(f.shape)) for f in pair) for pair in ((A, B), reference)]
        raise SettingsError(f"factors of {shapes[0]} cannot be aligned to {shapes[1]}; give both the same rank.")
    if side not in ("A", "both"):
        raise SettingsError(f'side is "{side}"; it must be "A" or "both".')
    cross = ref_A @ A.double().mT
    if side == "both":
        cross = cross + ref_B.mT @ B.double()
    P, _, Qh = torch.linalg.svd(cross)
    G = P @ Qh
    return (G @ A.double()).to(A.dtype), (B.double() @ G.mT).to(B.dtype)
