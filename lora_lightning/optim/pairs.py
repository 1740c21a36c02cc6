"""Algebra over factor pairs, batched: pairs of equal shapes are stacked, Grams of equal rank factorised in one call.

    G_A = A A^T,   G_B = B^T B,   G + d I = L L^T

    here        shape
    A, B        (n, r, d_in), (n, d_out, r)   n counts pairs, and the experts of a pair with leading axes
    G, L        (n, r, r)
    d           a number, raised tenfold where the factorisation fails

Everything here is float64, whatever the factors are: a Gram squares the condition number, and TF32 and autocast leave
float64 alone. Only r x r matrices are factorised, so the price is small beside a forward pass.

Factors that are sharded on several processes are gathered with their gradients, in one collective for all
pairs, and are full until the stacks are dropped at the end of a step. Every process then computes the same, and keeps
of each result the rows that it holds of the factor. A rule that needs no more of a factor than its Gram asks for
`sharded`: then only what is cut along its rank is gathered, as rows of A are; of the others, rows of B and experts,
the Grams are summed over the processes, in one all-reduce of r x r matrices, and steps are those of the shard.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lora_lightning.adapters.base import FactorPair
from lora_lightning.distributed import gather, local, own_rows, summed
from lora_lightning.errors import TrainingError

Side = Literal["A", "B"]
Part = Literal["A", "B", "grad_A", "grad_B"]

PARTS: tuple[Part, ...] = ("A", "B", "grad_A", "grad_B")
"""Factors and gradients, what a rule may read of a pair."""
_FACTOR: dict[Part, Side] = {"A": "A", "B": "B", "grad_A": "A", "grad_B": "B"}

RAISES = 12
"""How often the damping of a Gram is raised tenfold before the step gives up."""


@dataclass(frozen=True)
class Stack:
    """Pairs whose factors have the same shapes, one after another along the leading axis."""

    pairs: tuple[FactorPair, ...]
    gathered: Mapping[int, Tensor]
    """By id of a sharded factor or gradient: all of it. Of one not in here, the properties below are its shards."""
    sharded: bool = False
    """Whether what is not cut along its rank is here sharded."""

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
        return self.join([self.gathered.get(id(t), local(t)) for t in _read(self.pairs, part)])

    def gram(self, side: Side) -> Tensor:
        """A A^T or B^T B, (n, r, r); where `is_partial`, the part that this process adds to it."""
        found = gram_A(self.A) if side == "A" else gram_B(self.B)
        if len(found) == sum(self.counts):
            return found
        full = found.new_zeros(sum(self.counts), *found.shape[1:])
        full[self.held(side)] = found
        return full

    def is_partial(self, side: Side) -> bool:
        """Whether each process computes a part of the Grams of this side, all of which sum up to them."""
        return self.sharded and _sums_up(self.factors(side)[0], side)

    def held(self, side: Side) -> Tensor | slice:
        """Which entries of the leading axis this process has of the factors of `side`: all, unless experts are cut."""
        if not self.is_partial(side) or _cut(self.factors(side)[0]) in (-1, -2):
            return slice(None)
        numbers = torch.arange(sum(self.counts), device=self.pairs[0].lora_A.device)
        parts = zip(self.factors(side), numbers.split(self.counts), strict=True)
        return torch.cat([own_rows(part.reshape(f.shape[:-2]), f).reshape(-1) for f, part in parts])

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
        shapes = [(t.shape[: t.dim() - axes].numel(), *t.shape[t.dim() - axes :]) for t in tensors]
        return torch.cat([t.reshape(shape).double() for t, shape in zip(tensors, shapes, strict=True)])

    def split(self, stacked: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """(n, ...) as one tensor a pair, with the leading axes and the dtype of the factors in `like`."""
        parts = stacked.split([t.shape[:-2].numel() for t in like])
        return [p.reshape((*t.shape[:-2], *p.shape[1:])).to(t.dtype) for p, t in zip(parts, like, strict=True)]

    def own(self, stacked: Tensor, side: Side) -> dict[Tensor, Tensor]:
        """(n, ...) shaped by the factors of `side` as this process's shard of each, by factor."""
        factors = self.factors(side)
        if self.is_partial(side):
            return dict(zip(factors, self.split(stacked, [local(f) for f in factors]), strict=True))
        return {f: own_rows(part, f) for f, part in zip(factors, self.split(stacked, factors), strict=True)}


def _read(pairs: Iterable[FactorPair], part: Part) -> list[Tensor]:
    """One part of every pair as it lies; a missing gradient is zero, and full."""
    factors = [pair.lora_A if _FACTOR[part] == "A" else pair.lora_B for pair in pairs]
    if not part.startswith("grad"):
        return factors
    return [torch.zeros(f.shape, dtype=f.dtype, device=f.device) if f.grad is None else f.grad for f in factors]


def _cut(factor: Tensor) -> int | None:
    """The axis along which processes hold shards of a factor, counted from the last as -1; None where all are full."""
    if not isinstance(factor, DTensor) or len(factor.placements) != 1 or not isinstance(factor.placements[0], Shard):
        return None
    return factor.placements[0].dim - factor.dim()


def _sums_up(factor: Tensor, side: Side) -> bool:
    """Whether a factor's Gram is the sum of those of its shards: it is cut along anything but its rank."""
    return _cut(factor) not in (None, -2 if side == "A" else -1)


def stack_pairs(pairs: Sequence[FactorPair], read: Collection[Part] = PARTS, sharded: bool = False) -> list[Stack]:
    """Pairs by shape and layout of their factors and device, in the order of their first.

    Args:
        pairs: on every process the same, all of which take part where any factor is sharded.
        read: the parts that will be read.
        sharded: gather only what is cut along its rank.
    """
    shards: dict[int, Tensor] = {}
    for part in read:
        for factor, tensor in zip(_read(pairs, _FACTOR[part]), _read(pairs, part), strict=True):
            if isinstance(tensor, DTensor) and not (sharded and _sums_up(factor, _FACTOR[part])):
                shards[id(tensor)] = tensor
    gathered = dict(zip(shards, gather(list(shards.values())), strict=True))
    groups: dict[object, list[FactorPair]] = {}
    for pair in pairs:
        factors = (pair.lora_A, pair.lora_B)
        key = (*(f.shape[-2:] for f in factors), *map(_cut, factors), pair.lora_A.device)
        groups.setdefault(key, []).append(pair)
    return [Stack(tuple(group), gathered, sharded) for group in groups.values()]


def grams(sides: Sequence[tuple[Stack, Side]]) -> list[Tensor]:
    """The Gram of one side of each stack, (n, r, r); what is sharded is summed over the processes in one go."""
    found = [stack.gram(side) for stack, side in sides]
    partial = [i for i, (stack, side) in enumerate(sides) if stack.is_partial(side)]
    if partial:
        factors = [sides[i][0].factors(sides[i][1])[0] for i in partial]
        joined = summed(torch.cat([found[i].reshape(-1) for i in partial]), factors)
        for i, part in zip(partial, joined.split([found[i].numel() for i in partial]), strict=True):
            found[i] = part.view_as(found[i])
    return found


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

    def at(self, entries: Tensor | slice) -> Factorised:
        """Those of some entries of the leading axis."""
        return Factorised(self.L[entries], self.raises[entries])

    def solve(self, X: Tensor) -> Tensor:
        """(G + d I)^-1 X.   X: (n, r, k)."""
        half = torch.linalg.solve_triangular(self.L, X, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(self.L.mT, half, upper=True)
        return solved

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
