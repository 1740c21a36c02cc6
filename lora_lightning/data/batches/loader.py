"""A loader that continues inside an epoch, and that knows the tokens of each optimizer step before it is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]


def count_targets(batch: Batch) -> int:
    """Tokens with a loss in a causal language model's batch; the first of a row is never predicted."""
    return int((batch["labels"][:, 1:] != -100).sum())


def count_labelled(batch: Batch) -> int:
    """Tokens with a loss in a batch whose every token may carry a label."""
    return int((batch["labels"] != -100).sum())


class ResumableLoader(DataLoader[Any]):
    """A DataLoader with an exact position inside the epoch.

    The position counts batches handed out. It is kept with the sampler's epoch, so that one saved at an epoch's end
    skips nothing in the next. Batches before it are not collated again.

    With `count`, each batch carries `window_tokens` (int64 scalar): the sum of `count` over the batches of its
    accumulation window, so that a loss can be a mean over the whole optimizer step. Windows are counted from the
    epoch's start, as Lightning does, and the last one may be short.

    Args:
        dataset: Rows.
        window: Batches per optimizer step, or a function that tells them at the start of an epoch.
        count: Number to sum over a window; None attaches nothing and looks nothing ahead.
        limit: Batches of an epoch that are used, as the trainer's `limit_train_batches`: a number or a fraction.
        kwargs: As for DataLoader. The sampler must be seeded by epoch, as DistributedSampler is.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        window: int | Callable[[], int] = 1,
        count: Callable[[Batch], int] | None = None,
        limit: int | float = 1.0,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("generator", torch.Generator())  # else each iterator moves the global random state
        super().__init__(dataset, **kwargs)
        self.window = window
        self.count = count
        self.limit = limit
        self.seen = 0
        self._resume = (0, 0)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator: nothing is read before the first batch
        epoch, seen = self._resume
        self._resume = (0, 0)
        start = seen if epoch == self._epoch() else 0
        window = self.window() if callable(self.window) else self.window
        first = start - start % window if self.count else start
        batches: Iterator[Any] = iter(self._rest(first)) if first else super().__iter__()
        if self.count:
            batches = self._with_totals(batches, first, window, self.count)
        self.seen = start
        for batch in islice(batches, start - first, None):
            self.seen += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches handed out, and the epoch they belong to."""
        return {"seen": self.seen, "epoch": self._epoch()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the batches of `state` when the next epoch to be read is its epoch."""
        self._resume = (state["epoch"], state["seen"])

    def _epoch(self) -> int:
        return getattr(self.sampler, "epoch", 0)

    def _rest(self, first: int) -> DataLoader[Any]:
        return DataLoader(
            self.dataset,
            batch_sampler=list(self.batch_sampler or ())[first:],
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=self.generator,
        )

    def _with_totals(
        self, batches: Iterator[Batch], first: int, window: int, count: Callable[[Batch], int]
    ) -> Iterator[Batch]:
        end = min(len(self), self.limit) if isinstance(self.limit, int) else int(len(self) * self.limit)
        for position in range(first, end, window):
            group = list(islice(batches, min(window, end - position)))
            total = torch.tensor(sum(map(count, group)))
            for batch in group:
                yield {**batch, "window_tokens": total}
