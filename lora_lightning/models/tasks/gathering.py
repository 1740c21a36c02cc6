"""Tensors of all processes, with gradients back to the one that each comes from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


class _Gather(torch.autograd.Function):
    """All processes' tensors, stacked; each is handed the sum of what all of them say about its own."""

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

    A mean over processes of losses that each computes from all tensors has the gradients of the joint loss, since each
    process is handed back the sum of the gradients of its own part.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return mine.unsqueeze(0), 0
    every: Tensor = _Gather.apply(mine)  # type: ignore[no-untyped-call]
    return every, distributed.get_rank()
