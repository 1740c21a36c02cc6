"""Tensors of all processes, with gradients back to the one that each comes from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


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
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return mine.unsqueeze(0), 0
    every: Tensor = _Gather.apply(mine)  # type: ignore[no-untyped-call]
    return every, distributed.get_rank()
