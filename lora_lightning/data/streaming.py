"""Endless rows of a stream, and batches made of them, each with the position behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset, get_worker_info

from lora_lightning.adapters.seeds import generator
from lora_lightning.data.lines import first_bad_line
from lora_lightning.data.loader import Batch
from lora_lightning.data.packing import packed
from lora_lightning.errors import DataError

Encoder = Callable[[dict[str, list[Any]], list[int]], Mapping[str, list[Any]]]
Example = dict[str, list[int]]


@dataclass(frozen=True)
class Position:
    """Where a reader of a stream is: so many rows into a block of shuffled rows."""

    turn: int = 0
    """How often the stream has been read to its end."""
    block: int = 0
    """Number of the block."""
    offset: int = 0
    """Rows of the block that have been taken."""
    start: dict[str, Any] | None = None
    """State of the stream where the block begins; None at its beginning."""


def shuffled(
    stream: datasets.IterableDataset, size: int, seed: int, path: str, position: Position, sources: Sequence[str] = ()
) -> Iterator[tuple[Position, dict[str, Any]]]:
    """Rows of `stream` behind `position`, over and over, each with the position behind it.

    Blocks of `size` rows are shuffled, each by a draw of its own from (seed, turn, block). To go on anywhere, only the
    block there is read again; a buffer that is refilled row by row could not be found again.

    Raises:
        DataError: the stream cannot be read on (with the line, if one of `sources` is a file or folder that has a bad
            one), or holds no rows.
    """
    while True:
        stream.set_epoch(position.turn)
        if position.start is not None:
            stream.load_state_dict(position.start)
        blocks, read = stream.iter(size), False  # not iter(stream), which shares rows out to workers once more
        while block := _next(blocks, sources):
            read, path_of_turn = True, f"{path}, turn {position.turn}"
            order = torch.randperm(len(block), generator=generator(seed, "stream", position.block, path_of_turn))
            for offset in range(position.offset, len(block)):
                yield replace(position, offset=offset + 1), block[int(order[offset])]
            position = Position(position.turn, position.block + 1, 0, stream.state_dict())
        if not read and position.block == 0:
            raise DataError("a stream holds no examples.")
        position = Position(position.turn + 1)


def _next(blocks: Iterator[dict[str, list[Any]]], sources: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the next block; none at the end."""
    try:
        block = next(blocks, {})
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise DataError(f"a stream cannot be read on: {first_bad_line(sources) or reason}.") from error
    return [dict(zip(block, values, strict=True)) for values in zip(*block.values(), strict=True)]


@dataclass(frozen=True, eq=False)
class StreamBatches(IterableDataset[tuple[int, Batch, Position]]):
    """Batches of a process, made in as many workers as there are; each comes with its worker and the position behind.

    Workers read parts of their own of the stream, and none ends.

    Args:
        stream: The rows of this process.
        encode: Rows to examples; one with a reason in `lost` is left out.
        collate: Examples to a batch.
        batch_size: Examples, or packed rows, of a batch.
        max_length: Most tokens of an example, or of a packed row.
        packing: Whether examples share rows; they fill one after the other.
        block: Rows that are shuffled together.
        seed: Seed of their order.
        positions: Where workers go on, by number.
        sources: What the stream is made of, for messages.
    """

    stream: datasets.IterableDataset
    encode: Encoder
    collate: Callable[[Sequence[Example]], Batch]
    batch_size: int
    max_length: int
    packing: bool
    block: int
    seed: int
    positions: Mapping[int, Position]
    sources: Sequence[str]

    def __iter__(self) -> Iterator[tuple[int, Batch, Position]]:
        info = get_worker_info()
        worker = info.id if info else 0
        stream = self.stream.shard(info.num_workers, worker, contiguous=False) if info else self.stream
        examples = self._examples(worker, stream)
        rows = self._packs(examples) if self.packing else examples
        while True:
            batch = list(islice(rows, self.batch_size))
            yield worker, self.collate([example for _, example in batch]), batch[-1][0]

    def _examples(self, worker: int, stream: datasets.IterableDataset) -> Iterator[tuple[Position, Example]]:
        position = self.positions.get(worker, Position())
        since = position.turn  # when something was last found to learn
        rows = shuffled(stream, self.block, self.seed, f"worker {worker}", position, self.sources)
        for after, row in rows:
            if after.turn > since + 1:
                raise DataError("a stream holds no example that has anything to learn.")
            made = self.encode({name: [value] for name, value in row.items()}, [0])
            if made["input_ids"] and not any(made.get("lost", ())):
                ids = list(made["input_ids"][0][: self.max_length])
                since = after.turn
                yield after, {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": _labels(made, ids)}

    def _packs(self, examples: Iterator[tuple[Position, Example]]) -> Iterator[tuple[Position, Example]]:
        """Rows that are filled until the next example does not fit, with the position behind their last example."""
        held: list[Example] = []
        tokens, behind = 0, Position()
        for after, example in examples:
            if held and tokens + len(example["input_ids"]) > self.max_length:
                yield behind, packed(held)
                held, tokens = [], 0
            held.append(example)
            tokens, behind = tokens + len(example["input_ids"]), after


def _labels(made: Mapping[str, list[Any]], ids: list[int]) -> list[int]:
    return list(made["labels"][0]) if "labels" in made else ids
