"""Algebra over factor pairs, batched: pairs of equal shapes are stacked, Grams of equal rank factorised in one call.

    G_A = A A^T,   G_B = B^T B,   G + d I = L L^T

    here        shape
    A, B        (n, r, d_in), (n, d_out, r)   n counts pairs, and the experts of a pair with leading axes
    G, L        (n, r, r)
    d           a number, raised tenfold where the factorisation fails

Everything here is float64, whatever the factors are: a Gram squares the condition number, and TF32 and autocast leave
float64 alone. Only r x r matrices are factorised, so the price is small beside a forward pass.

Factors that lie in rows on several processes are gathered with their gradients, in one packed collective for all pairs,
and are whole until the stacks are dropped at the end of a step. Every process then computes the same, and keeps of each
result the rows that it holds of the factor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.base import FactorPair
from lora_lightning.errors import TrainingError
from lora_lightning.pieces import gather, own_rows

Side = Literal["A", "B"]
Part = Literal["A", "B", "grad_A", "grad_B"]

PARTS: tuple[Part, ...] = ("A", "B", "grad_A", "grad_B")
"""Factors and gradients, what a rule may read of a pair."""

RAISES = 12
"""How often the damping of a Gram is raised tenfold before the step gives up."""


@dataclass(frozen=True)
class Stack:
    """Pairs whose factors have the same shapes, one after another along the leading axis."""

    pairs: tuple[FactorPair, ...]
    gathered: Mapping[int, Tensor]
    """By id of a sharded factor or gradient: all of it."""

    def factors(self, side: Side) -> list[Tensor]:
        """One side of every pair, as it is: the optimizer's own tensors."""
        return [pair.lora_A if side == "A" else pair.lora_B for pair in self.pairs]

    @property
    def A(self) -> Tensor:
        """The first factors, (n, r, d_in)."""
        return self._joined("A")

    @property
    def B(self) -> Tensor:
        """The second factors, (n, d_out, r)."""
        return self._joined("B")

    @property
    def grad_A(self) -> Tensor:
        """Gradients of A, (n, r, d_in); zero where there is none."""
        return self._joined("grad_A")

    @property
    def grad_B(self) -> Tensor:
        """Gradients of B, (n, d_out, r); zero where there is none."""
        return self._joined("grad_B")

    def _joined(self, part: Part) -> Tensor:
        return self.join([self.gathered.get(id(t), t) for t in _read(self.pairs, part)])

    @property
    def scaling(self) -> Tensor:
        """s, (n, 1, 1)."""
        numbers = [pair.scaling for pair, count in zip(self.pairs, self.counts, strict=True) for _ in range(count)]
        return torch.tensor(numbers, dtype=torch.float64, device=self.pairs[0].lora_A.device)[:, None, None]

    @property
    def counts(self) -> list[int]:
        """Entries of the leading axis that each pair takes."""
        return [pair.lora_A.shape[:-2].numel() for pair in self.pairs]

    def join(self, tensors: Sequence[Tensor], axes: int = 2) -> Tensor:
        """One tensor a pair, (*lead, ...), as (n, ...) in float64; `axes` counts those behind the leading ones."""
        return torch.cat([t.reshape(-1, *t.shape[t.dim() - axes :]).double() for t in tensors])

    def split(self, stacked: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """(n, ...) as one tensor a pair, with the leading axes and the dtype of those in `like`."""
        parts = stacked.split(self.counts)
        leads = [pair.lora_A.shape[:-2] for pair in self.pairs]
        return [p.reshape((*lead, *p.shape[1:])).to(t.dtype) for p, lead, t in zip(parts, leads, like, strict=True)]

    def own(self, stacked: Tensor, side: Side) -> dict[Tensor, Tensor]:
        """(n, ...) shaped by the factors of `side` as this process's piece of each, by factor."""
        factors = self.factors(side)
        return {f: own_rows(part, f) for f, part in zip(factors, self.split(stacked, factors), strict=True)}


def _read(pairs: Iterable[FactorPair], part: Part) -> list[Tensor]:
    """One part of every pair as it lies; a missing gradient is zero, and whole."""
    factors = [pair.lora_A if part.endswith("A") else pair.lora_B for pair in pairs]
    if not part.startswith("grad"):
        return factors
    return [torch.zeros(f.shape, dtype=f.dtype, device=f.device) if f.grad is None else f.grad for f in factors]


def stack_pairs(pairs: Sequence[FactorPair], read: Collection[Part] = PARTS) -> list[Stack]:
    """Pairs by shape of their factors and device, in the order of their first.

    Args:
        pairs: on every process the same, all of which take part where any factor is sharded.
        read: the parts that will be read.
    """
    pieces = {id(t): t for part in read for t in _read(pairs, part) if isinstance(t, DTensor)}
    gathered = dict(zip(pieces, gather(list(pieces.values())), strict=True))
    groups: dict[object, list[FactorPair]] = {}
    for pair in pairs:
        key = (pair.lora_A.shape[-2:], pair.lora_B.shape[-2:], pair.lora_A.device)
        groups.setdefault(key, []).append(pair)
    return [Stack(tuple(group), gathered) for group in groups.values()]


def gram_A(A: Tensor) -> Tensor:
    """A A^T.   A: (n, r, d_in) -> (n, r, r)."""
    return A @ A.mT


def gram_B(B: Tensor) -> Tensor:
    """B^T B.   B: (n, d_out, r) -> (n, r, r)."""
    return B.mT @ B


@dataclass(frozen=True)
class Factorised:
    """Cholesky factors of damped Grams."""

    L: Tensor
    """(n, r, r), lower triangular."""
    raises: Tensor
    """(n,), how often the damping was raised tenfold; 0 where the first try succeeded."""

    def solve(self, X: Tensor) -> Tensor:
        """(G + d I)^-1 X.   X: (n, r, k)."""
        half = torch.linalg.solve_triangular(self.L, X, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(self.L.mT, half, upper=True)
        return whole

    def solve_right(self, X: Tensor) -> Tensor:
        """X (G + d I)^-1.   X: (n, k, r)."""
        return self.solve(X.mT).mT


def factorise(grams: Sequence[Tensor], damping: float) -> list[Factorised]:
    """Cholesky factors of G + damping I, one call a distinct rank and device, in the order of `grams`.

    Args:
        grams: batches (n, r, r) of symmetric positive semidefinite matrices.
        damping: added to every diagonal; raised tenfold for the matrices, and only those, that are not positive
            definite with it.

    Raises:
        TrainingError: a matrix that `RAISES` tenfold dampings do not mend, so one with an entry that is no number.
    """
    found: dict[int, Factorised] = {}
    for where in _alike(grams):
        sizes = [grams[i].shape[0] for i in where]
        L, raises = damped_cholesky(torch.cat([grams[i] for i in where]), damping)
        parts = zip(where, L.split(sizes), raises.split(sizes), strict=True)
        found |= {i: Factorised(part, count) for i, part, count in parts}
    return [found[i] for i in range(len(grams))]


def _alike(grams: Sequence[Tensor]) -> list[list[int]]:
    groups: dict[object, list[int]] = {}
    for i, gram in enumerate(grams):
        groups.setdefault((gram.shape[-1], gram.device), []).append(i)
    return list(groups.values())


def damped_cholesky(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """L with L L^T = G + d I, and how often each d was raised: (n, r, r), (n,).

    Raises:
        TrainingError: a matrix stays indefinite.
    """
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    L, info = torch.linalg.cholesky_ex(gram + damping * identity)
    raises = torch.zeros_like(info)
    if not info.any():
        return L, raises
    # without a damping to raise, the first is at rounding level of the matrix
    size = gram.diagonal(dim1=-2, dim2=-1).amax(-1)
    start = torch.where(size > 0, torch.finfo(gram.dtype).eps * size, 1.0).clamp_min(damping)
    for _ in range(RAISES):
        raises = raises + (info > 0)
        ridge = torch.where(raises > 0, start * 10.0**raises, damping)
        L, info = torch.linalg.cholesky_ex(gram + ridge[:, None, None] * identity)
        if not info.any():
            return L, raises
    raise TrainingError(
        f"{int((info > 0).sum())} Gram matrices of factor pairs have no Cholesky factor even with a damping of "
        f"{float(ridge.max()):g}; the factors are not finite. Lower the learning rate."
    )
