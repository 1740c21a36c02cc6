"""Start values of a pair of factors from a weight, a covariance of inputs or a gradient.

    weight_start        s B A is the best approximation of W of rank r          (or of its trailing part)
    covariance_start    rows of A are the leading directions of the inputs      B stays zero
    gradient_start      A and B are leading singular vectors of dL/dW

Singular vectors are computed in float64 and have signs of their own choice: the largest entry of a right one is
positive, so that two machines start alike.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Two factors; a side that is None is left as it is."""

    A: Tensor | None
    """(*lead, rank, d_in)"""
    B: Tensor | None
    """(*lead, d_out, rank)"""


def singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (*lead, m, k), S (*lead, k), V^T (*lead, k, n) in float64, with fixed signs."""
    U, S, Vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    largest = Vh.abs().argmax(dim=-1, keepdim=True)
    sign = Vh.gather(-1, largest).sign()
    return U * sign.mT, S, Vh * sign


def weight_start(
    weight: Tensor, rank: int, scaling: float, part: Literal["leading", "trailing"] = "leading"
) -> Factors:
    """Factors with s B A = sum of `rank` singular triplets of the weight; half of each singular value on each side.

    Args:
        weight: (*lead, d_out, d_in).
        rank: number of triplets.
        scaling: s.
        part: which end of the spectrum.
    """
    U, S, Vh = singular(weight)
    keep = slice(0, rank) if part == "leading" else slice(S.shape[-1] - rank, None)
    root = (S[..., keep] / scaling).sqrt()
    return Factors(root[..., :, None] * Vh[..., keep, :], U[..., :, keep] * root[..., None, :])


def randomised_weight_start(weight: Tensor, rank: int, scaling: float, iterations: int) -> Factors:
    """As `weight_start` of the leading part, by a randomised decomposition with power iterations; float32.

    The random test matrix is drawn from a seed of its own, so that the start is the same wherever it is computed.
    """
    matrix = weight.detach().float()
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix, rank, niter=iterations)
    root = (S / scaling).sqrt()
    return Factors(root[..., :, None] * V.mT, U * root[..., None, :])


def orthonormal_start(weight: Tensor, rank: int) -> Factors:
    """The first `rank` rows of R and columns of Q, for a weight W = Q R (*lead, d_out, d_in)."""
    Q, R = torch.linalg.qr(weight.detach().double())
    return Factors(R[..., :rank, :], Q[..., :, :rank])


def covariance_start(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading directions of inputs as orthonormal rows (rank, d_in), and all eigenvalues, largest first.

    Args:
        covariance: (d_in, d_in), symmetric.
        rank: number of directions.
    """
    _, values, directions = singular(covariance)
    return directions[:rank], values


def context_start(
    weight: Tensor, covariance: Tensor, rank: int, scaling: float, part: Literal["leading", "trailing"], damping: float
) -> Factors:
    """Factors with s B A = a part of the singular triplets of W C, taken back by C^-1.

    Args:
        weight: W (d_out, d_in).
        covariance: C (d_in, d_in), symmetric.
        rank: number of triplets.
        scaling: s.
        part: which end of the spectrum of W C.
        damping: first multiple of the mean of C's diagonal that is added to it; doubled until C can be inverted.
    """
    C = damped(covariance.double(), damping)
    W = weight.detach().double().to(C.device)
    U, S, Vh = singular(W @ C)
    V = torch.linalg.solve(C, Vh.mT).mT  # Vh C^-1, as C is symmetric
    keep = slice(0, rank) if part == "leading" else slice(S.shape[-1] - rank, None)
    root = (S[keep] / scaling).sqrt()
    return Factors(root[:, None] * V[keep], U[:, keep] * root)


def damped(covariance: Tensor, damping: float) -> Tensor:
    """C + d mean(diag C) I, for the first d of `damping`, twice that, ... with |C C^-1 - I| below 0.05."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    while True:
        C = covariance + damping * covariance.diagonal().mean() * eye
        inverse, failed = torch.linalg.inv_ex(C)
        if not bool(failed) and float(torch.dist(C @ inverse, eye)) < 0.05:
            return C
        damping *= 2


def gradient_start(gradient: Tensor, rank: int) -> Factors:
    """A: the `rank` leading right singular vectors; B: the left ones that follow, so that no direction is there twice.

    Where the gradient has fewer than 2 `rank` directions, B takes the leading ones too.

    Args:
        gradient: dL/dW, (d_out, d_in).
        rank: number of directions of each side.
    """
    U, S, Vh = singular(gradient)
    first = rank if 2 * rank <= S.shape[-1] else 0
    return Factors(Vh[..., :rank, :], U[..., :, first : first + rank])
