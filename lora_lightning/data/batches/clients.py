"""Clients cut from one data set, and a sampler that gives each its turn.

Every client has a stream of its own: its examples, shuffled anew in each pass over them, without end. A turn takes the
next few batches of one client's stream, a round one turn of each. What comes when is a function of (seed, epoch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from lora_lightning.errors import DataError
from lora_lightning.seeds import generator


def client_parts(
    count: int, clients: int, seed: int, labels: Sequence[Any] | None = None, concentration: float | None = None
) -> list[Tensor]:
    """Row numbers of each client, ascending; every row belongs to one.

    Args:
        count: rows of the data set.
        clients: how many clients share them.
        seed: decides who gets what.
        labels: label of each row, where parts are to differ.
        concentration: of a Dirichlet distribution over clients, drawn for each label: the smaller, the more a label
            belongs to few clients. None cuts a permutation into parts of equal size.

    Raises:
        DataError: a client would have no row.
    """
    draw = np.random.default_rng([seed, clients])
    parts: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(clients)]
    if concentration is None:
        for part, rows in zip(parts, np.array_split(draw.permutation(count), clients), strict=True):
            part.append(rows)
    else:
        each = np.unique(np.asarray(labels), return_inverse=True)[1]
        for label in range(int(each.max(initial=-1)) + 1):
            rows = draw.permutation(np.flatnonzero(each == label))
            cuts = np.cumsum(draw.dirichlet([concentration] * clients))[:-1] * len(rows)
            for part, some in zip(parts, np.split(rows, cuts.astype(int)), strict=True):
                part.append(some)
    found = [torch.from_numpy(np.sort(np.concatenate(part))) if part else torch.empty(0) for part in parts]
    for client, own in enumerate(found):
        if not len(own):
            raise DataError(
                f"client {client} of {clients} would have none of the {count} training rows; take fewer clients, more "
                "rows, or parts that differ less."
            )
    return found


class ClientSampler(DistributedSampler[Any]):
    """Row numbers in turns of clients; batches of a turn hold rows of one client alone.

    Args:
        dataset: the rows.
        parts: row numbers of each client.
        batch_size: rows of one process's batch.
        turn: batches of a turn.
        seed: decides the order of every stream.
        options: `num_replicas` and `rank`, as for DistributedSampler.
    """

    def __init__(
        self, dataset: Dataset[Any], parts: Sequence[Tensor], batch_size: int, turn: int, seed: int, **options: Any
    ) -> None:
        super().__init__(dataset, shuffle=True, seed=seed, **options)
        self.parts, self.batch_size, self.turn = list(parts), batch_size, turn
        taken = turn * batch_size * self.num_replicas
        self.rounds = max(1, len(cast(Sized, dataset)) // (taken * len(parts)))
        """Rounds of an epoch: about one pass over all rows."""
        self._taken = taken

    def __iter__(self) -> Iterator[int]:
        """Rows of this process, batch after batch."""
        for number in range(self.epoch * self.rounds, (self.epoch + 1) * self.rounds):
            for client in range(len(self.parts)):
                rows = self._stream(client, number * self._taken, self._taken)
                shares = rows.view(self.turn, self.num_replicas, self.batch_size)
                yield from shares[:, self.rank].flatten().tolist()

    def __len__(self) -> int:
        return self.rounds * len(self.parts) * self.turn * self.batch_size

    def _stream(self, client: int, start: int, count: int) -> Tensor:
        """Rows `start` to `start + count` of a client's stream."""
        rows = self.parts[client]
        passes = range(start // len(rows), (start + count - 1) // len(rows) + 1)
        orders = [
            torch.randperm(len(rows), generator=generator(self.seed, "client order", number, str(client)))
            for number in passes
        ]
        return rows[torch.cat(orders)[start - passes.start * len(rows) :][:count]]
