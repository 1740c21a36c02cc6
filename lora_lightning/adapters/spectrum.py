"""Singular values of an update, and how many of them it takes: exactly from its factors, or from the dense update.

    D = B A,   B = Q_B R_B,   A^T = Q_A R_A,   R_B R_A^T = U S V^T    =>    D = (Q_B U) S (Q_A V)^T

Effective rank at a fraction f (Biderman et al., 2024, arXiv:2405.09673, with f = 0.9):

    k_f = min k with s_1^2 + ... + s_k^2 >= f |D|_F^2

and stable rank |D|_F^2 / s_1^2. All of it in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """What the singular values of one update say; ranks of stacked matrices, such as experts', are their mean."""

    effective_rank: float
    """Singular values that hold the fraction of the squared size; 0 for an update of zero."""
    stable_rank: float
    """Squared size over the largest squared singular value; 0 for an update of zero."""
    norm: float
    """Frobenius norm, over all matrices."""
    largest: float
    """Largest singular value of all matrices."""


def factored_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (*lead, d_out, k), S (*lead, k), Vh (*lead, k, d_in) of B A, which is never formed; k is at most the rank."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


@torch.no_grad()
def factored_spectrum(A: Tensor, B: Tensor, fraction: float = 0.9) -> Spectrum:
    """The spectrum of B A, for A (*lead, rank, d_in) and B (*lead, d_out, rank)."""
    A, B = _exact(A), _exact(B)
    core = torch.linalg.qr(B)[1] @ torch.linalg.qr(A.mT)[1].mT
    return _of_energies(torch.linalg.svdvals(core).square(), fraction)


@torch.no_grad()
def dense_spectrum(delta: Tensor, fraction: float = 0.9) -> Spectrum:
    """The spectrum of an update (*lead, d_out, d_in), from the smaller of its two Gram matrices."""
    delta = _exact(delta)
    gram = delta @ delta.mT if delta.shape[-2] <= delta.shape[-1] else delta.mT @ delta
    return _of_energies(torch.linalg.eigvalsh(gram).clamp_min(0).flip(-1), fraction)


def effective_rank(energies: Tensor, fraction: float) -> Tensor:
    """How many squared singular values (*lead, k), largest first, hold a fraction of their sum; 0 where it is zero."""
    total = energies.sum(-1, keepdim=True)
    # rounding of the sums must not ask for a value that is not there
    short = energies.cumsum(-1) < fraction * total * (1 - 1e-12)
    return (short.sum(-1) + 1).clamp_max(energies.shape[-1]) * (total.squeeze(-1) > 0)


def _of_energies(energies: Tensor, fraction: float) -> Spectrum:
    total, largest = energies.sum(-1), energies[..., 0]
    stable = torch.where(largest > 0, total / largest, 0.0)
    ranks = effective_rank(energies, fraction).double()
    return Spectrum(float(ranks.mean()), float(stable.mean()), float(total.sum().sqrt()), float(largest.max().sqrt()))


def _exact(tensor: Tensor) -> Tensor:
    """In float64, which does not exist on every device."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)
