"""A weight s B A fitted to a target under weighted squares, with its full gradient at hand, for pair optimizers."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import FactorPair


class Problem:
    """loss = 1/2 sum weights * (s B A - target)^2, in float64 unless said otherwise."""

    def __init__(
        self,
        r: int = 3,
        d_in: int = 7,
        d_out: int = 5,
        lead: tuple[int, ...] = (),
        scaling: float = 2.0,
        zero_B: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        name: str = "p",
    ) -> None:
        g = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(*lead, *size, generator=g, dtype=torch.float64).to(dtype)

        self.A, self.B = nn.Parameter(draw(r, d_in)), nn.Parameter(draw(d_out, r) * (not zero_B))
        self.target, self.weights = draw(d_out, d_in), draw(d_out, d_in).abs() + 0.1
        self.scaling = scaling
        self.pair = FactorPair(name, self.A, self.B, scaling)

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.A, self.B]

    def weight(self) -> Tensor:
        return self.scaling * self.B @ self.A

    def G(self) -> Tensor:
        """Gradient of the weight."""
        return (self.weights * (self.weight() - self.target)).detach()

    def loss(self) -> Tensor:
        return 0.5 * (self.weights * (self.weight() - self.target).square()).sum()

    def backward(self, factor: float = 1.0) -> None:
        """Fresh gradients."""
        self.A.grad = self.B.grad = None
        (factor * self.loss()).backward()

    def turned(self, Q: Tensor) -> Problem:
        """The same weight and loss from (Q A, B Q^-1)."""
        other = Problem.__new__(Problem)
        other.__dict__ |= self.__dict__
        other.A = nn.Parameter(Q @ self.A.detach())
        other.B = nn.Parameter(self.B.detach() @ torch.linalg.inv(Q))
        other.pair = FactorPair(self.pair.name, other.A, other.B, self.scaling)
        return other


def bound(kind: Any, *problems: Problem, **settings: Any) -> Any:
    """The optimizer over the problems' factors, with their pairs."""
    optimizer = kind([p for problem in problems for p in problem.params], **settings)
    optimizer.bind_pairs(tuple(problem.pair for problem in problems))
    return optimizer


def run(optimizer: Any, steps: int, *problems: Problem, factor: float = 1.0) -> None:
    for _ in range(steps):
        for problem in problems:
            problem.backward(factor)
        optimizer.step()


def saved(optimizer: Any) -> dict[str, Any]:
    """The optimizer's state after a trip through a file that may hold plain data only."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def invertible(r: int, seed: int = 9) -> Tensor:
    """A matrix with condition number 3."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64))[0] for _ in range(2))
    return U @ torch.diag(torch.linspace(1, 3, r, dtype=torch.float64)) @ V


def projections(problem: Problem) -> tuple[Tensor, Tensor]:
    """P_B (d_out, d_out) and P_A (d_in, d_in), dense, through pseudo-inverses."""
    A, B = problem.A.detach(), problem.B.detach()
    return B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
