"""A loader over a stream that continues at the exact example, with any number of workers."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from lora_lightning.data.batches.loader import Batch
from lora_lightning.data.batches.streaming import Position, StreamBatches
from lora_lightning.distributed import gather_objects
from lora_lightning.errors import ResumeError


class StreamLoader:
    """Batches of a stream without end, the workers' in turn.

    Workers read ahead, so each batch brings the position behind it, and the loader's own position is that of the batch
    it has handed out last. With `count`, batches carry `window_tokens`, as those of `ResumableLoader` do.

    Args:
        make: Makes the batches that follow the workers' positions.
        workers: Processes that make them; 0 makes them here.
        window: Batches per optimizer step, or a function that tells them when reading starts.
        count: Number to sum over a window.
        length: Batches of the run, or a function that tells them; None for as many as are asked for.
    """

    def __init__(
        self,
        make: Callable[[dict[int, Position]], StreamBatches],
        *,
        workers: int = 0,
        window: int | Callable[[], int] = 1,
        count: Callable[[Batch], int] | None = None,
        length: Callable[[], int] | None = None,
    ) -> None:
        self.make, self.workers, self.window, self.count, self.length = make, workers, window, count, length
        self.positions: dict[int, Position] = {}
        """Behind the last batch of each worker before the current window."""
        self.reached: dict[int, Position] = {}
        """Behind the last batch of each worker that has been handed out."""
        self.next = 0
        """Worker whose batch opens the current window."""
        self.taken = 0
        """Batches of the current window that have been handed out."""

    def __len__(self) -> int:
        return self.length() if self.length is not None else sys.maxsize

    def __iter__(self) -> Iterator[Batch]:
        size = self.window() if callable(self.window) else self.window
        batches = self._in_turn()
        while True:
            window = list(islice(batches, size))
            self.reached |= {worker: position for worker, _, position in window[: self.taken]}
            total = torch.tensor(sum(self.count(batch) for _, batch, _ in window)) if self.count else None
            for worker, batch, position in window[self.taken :]:
                self.taken += 1
                self.reached[worker] = position
                yield batch if total is None else {**batch, "window_tokens": total}
            self.positions |= {worker: position for worker, _, position in window}
            self.next, self.taken = (self.next + size) % max(1, self.workers), 0

    def state_dict(self) -> dict[str, Any]:
        """Positions at the start of the window, and how many of its batches have been handed out, of every process.

        Plain data. Every process takes part, since each reads another part and only the first one's state is written.
        """
        positions = {worker: dataclasses.asdict(position) for worker, position in self.positions.items()}
        mine = {"positions": positions, "next": self.next, "taken": self.taken}
        return {"workers": self.workers, "ranks": gather_objects(mine)}

    def counts(self) -> Counter[str]:
        """What became of the rows of the first turn, of all workers and processes; all of them take part."""
        mine = sum((Counter(position.counts) for position in self.reached.values()), Counter())
        return sum(gather_objects(mine), Counter())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ResumeError: it was taken with another number of workers, which would read other parts.
        """
        if state["workers"] != self.workers:
            raise ResumeError(
                f"data.num_workers led to {state['workers']} readers of the stream when the run was saved, and to "
                f"{self.workers} now; they would read other examples. Resume with the same number."
            )
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        mine = state["ranks"][rank]
        self.positions = {worker: Position(**position) for worker, position in mine["positions"].items()}
        self.reached = dict(self.positions)
        self.next, self.taken = mine["next"], mine["taken"]

    def _in_turn(self) -> Iterator[tuple[int, Batch, Position]]:
        """Batches in the order of workers from `next` on; a DataLoader begins with the first one whatever was last."""
        ready: dict[int, deque[tuple[int, Batch, Position]]] = defaultdict(deque)
        worker = self.next
        for made in DataLoader(self.make(dict(self.positions)), batch_size=None, num_workers=self.workers):
            ready[made[0]].append(made)
            while ready[worker]:
                yield ready[worker].popleft()
                worker = (worker + 1) % max(1, self.workers)
