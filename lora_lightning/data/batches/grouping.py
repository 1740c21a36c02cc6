"""A sampler that puts texts of similar length into one batch, so that less of it is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch.utils.data import DistributedSampler

POOL = 16
"""Batches among which texts are sorted; with more there is less padding and less chance in what meets in a batch."""


class LengthGroupedSampler(DistributedSampler[Any]):
    """DistributedSampler whose order is sorted by length inside pools of batches; the batches are shuffled again.

    The order is a function of (seed, epoch). Without shuffling, all rows of a process are sorted.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows a batch.
        options: As for DistributedSampler.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, **options: Any) -> None:
        super().__init__(lengths, **options)  # type: ignore[arg-type]  # only its length is read
        self.lengths, self.batch_size = lengths, batch_size

    def __iter__(self) -> Iterator[Any]:
        order = list(super().__iter__())
        if not self.shuffle:
            return iter(sorted(order, key=self._length))
        pool = self.batch_size * POOL
        batches = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=self._length)
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        last = [batch for batch in batches if len(batch) < self.batch_size]  # a short batch stays the last
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        return chain.from_iterable([*shuffled, *last])

    def _length(self, row: int) -> int:
        return self.lengths[row]
