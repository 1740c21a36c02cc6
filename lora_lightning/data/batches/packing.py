"""Several examples in one row, so that almost nothing of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset, DistributedSampler

from lora_lightning.data.tokens.causal import NO_LOSS


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Places of `lengths`, which fall, in rows of `room`: each goes where the least room is left that takes it."""
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # keys of `open_rows`, rising
    for place, length in enumerate(lengths):
        fits = bisect_left(rooms, length)
        if fits == len(rooms):
            rows.append([])
            row, left = len(rows) - 1, room
        else:
            left = rooms[fits]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del open_rows[left], rooms[fits]
        rows[row].append(place)
        if left > length:
            if left - length not in open_rows:
                insort(rooms, left - length)
            open_rows[left - length].append(row)
    return rows


class PackSampler(DistributedSampler[Any]):
    """DistributedSampler over packed rows, each a list of examples; the order is a function of (seed, epoch).

    Lengths alone decide how many rows there are and which lengths share one, so that every epoch has as many batches.
    Examples of one length change places from epoch to epoch.

    Args:
        lengths: Tokens of each example.
        room: Tokens of a row.
        options: As for DistributedSampler.
    """

    def __init__(self, lengths: Sequence[int], room: int, **options: Any) -> None:
        self.lengths = torch.tensor(lengths)
        self.places = best_fit(self.lengths.sort(descending=True).values.tolist(), room)
        super().__init__(self.places, **options)  # type: ignore[arg-type]  # only its length is read

    def __iter__(self) -> Iterator[Any]:
        order = torch.arange(len(self.lengths))
        if self.shuffle:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        order = order[self.lengths[order].argsort(descending=True, stable=True)]
        return ([int(order[place]) for place in self.places[row]] for row in super().__iter__())


class Packs(Dataset[dict[str, list[int]]]):
    """Rows made of several examples: input_ids, labels, and position_ids that start again with each example.

    The restarts tell transformers where an example begins; no mask is needed beside them. The first token of an
    example carries no label, because nothing stands before it.
    """

    def __init__(self, examples: datasets.Dataset) -> None:
        self.examples = examples.select_columns(["input_ids", "labels"])

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, pack: Sequence[int]) -> dict[str, list[int]]:
        parts = self.examples[list(pack)]
        names = ("input_ids", "labels")
        return packed([{name: parts[name][number] for name in names} for number in range(len(pack))])


def packed(examples: Sequence[Mapping[str, list[int]]]) -> dict[str, list[int]]:
    """One row of several examples."""
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        row["input_ids"] += example["input_ids"]
        row["labels"] += [NO_LOSS, *example["labels"][1:]]
        row["position_ids"] += range(len(example["input_ids"]))
    return row
