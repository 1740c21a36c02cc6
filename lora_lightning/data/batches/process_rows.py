"""The rows that each of several processes measures: every row once, in as many batches on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count
from typing import Any

from torch.utils.data import DistributedSampler


class EachOnce(DistributedSampler[Any]):
    """The rows of one process, in the order of another sampler, without those that fill the last processes up.

    Args:
        dealt: deals row i to process i mod n, in any order, and some rows to two of them.
    """

    def __init__(self, dealt: DistributedSampler[Any]) -> None:
        super().__init__(dealt.dataset, dealt.num_replicas, dealt.rank, shuffle=False, seed=dealt.seed)
        self.dealt = dealt
        self.own = range(dealt.rank, len(dealt.dataset), dealt.num_replicas)  # type: ignore[arg-type]  # it has a length
        self.num_samples = len(self.own)

    def __iter__(self) -> Iterator[Any]:
        return (row for row in self.dealt if row in self.own)

    def set_epoch(self, epoch: int) -> None:
        """Tell the order's own sampler, too."""
        super().set_epoch(epoch)
        self.dealt.set_epoch(epoch)


def equal_batches(rows: int, processes: int, batch_size: int) -> int:
    """The size nearest to `batch_size`, smaller ones first, that gives all processes as many batches.

    Processes differ by one row. Where that row is a batch of its own, the others would wait for it.

    Args:
        rows: at least one a process.
        processes: n; process k has rows k, k + n, ...
        batch_size: what is wanted.
    """
    smaller = rows // processes
    if rows % processes == 0:
        return batch_size
    return next(size for size in chain(range(batch_size, 1, -1), count(batch_size + 1)) if smaller % size)
