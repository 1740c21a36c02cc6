"""Tensors of all processes, with gradients back to the one that each comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, distributed

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process computes by itself: others wait for it, and would not take part."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def _together() -> bool:
    return not _alone.get() and distributed.is_initialized() and distributed.get_world_size() > 1


class _Gather(torch.autograd.Function):
    """All processes' tensors, stacked. Backward, each process gets the sum of all gradients of its own tensor."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:  # noqa: ARG004 - nothing to keep
        every = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
        distributed.all_gather(every, mine.contiguous())
        return torch.stack(every)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total[distributed.get_rank()]


def gather(mine: Tensor) -> tuple[Tensor, int]:
    """Tensors of all processes, (processes, *shape), and which of them is this one's; all have one shape.

    Each process gets back the sum of all gradients of its own tensor. Where every process computes a loss from all
    tensors, the mean over processes therefore has the gradients of the joint loss.
    """
    if not _together():
        return mine.unsqueeze(0), 0
    every: Tensor = _Gather.apply(mine)  # type: ignore[no-untyped-call]
    return every, distributed.get_rank()


def mean_of_all(values: Tensor) -> Tensor:
    """The mean of all processes' values, a scalar without gradient."""
    tally = torch.stack([values.detach().sum(), values.new_tensor(float(values.numel()))])
    if _together():
        distributed.all_reduce(tally)
    return tally[0] / tally[1].clamp_min(1)
