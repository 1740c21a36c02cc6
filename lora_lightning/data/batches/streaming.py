"""Endless rows of a stream, and batches made of them, each with the position behind it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import datasets
import torch
from torch.utils.data import IterableDataset, get_worker_info

from lora_lightning.data.batches.loader import Batch
from lora_lightning.data.batches.packing import packed
from lora_lightning.data.sources.tables import UNREADABLE
from lora_lightning.errors import DataError
from lora_lightning.seeds import generator

Encoder = Callable[[dict[str, list[Any]], list[int]], Mapping[str, list[Any]]]
Example = dict[str, list[int]]
Fill = Literal["examples", "packs", "chunks"]

log = logging.getLogger(__name__)


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
    part: int = 0
    """Examples of the next row that have been taken, where a row gives several."""
    used: int = 0
    """Tokens of the next example that have been taken, where examples are cut into chunks."""
    counts: dict[str, int] = field(default_factory=dict)
    """What became of the rows of the first turn: examples, truncated, dropped, skipped."""


def shuffled(
    stream: datasets.IterableDataset, size: int, seed: int, path: str, position: Position
) -> Iterator[tuple[Position, dict[str, Any]]]:
    """Rows of `stream` behind `position`, over and over, each with the position behind it.

    Blocks of `size` rows are shuffled, each by a draw of its own from (seed, turn, block). To go on anywhere, only the
    block there is read again; a buffer that is refilled row by row could not be found again.

    Raises:
        DataError: the stream cannot be read on or holds no rows.
    """
    while True:
        stream.set_epoch(position.turn)
        if position.start is not None:
            stream.load_state_dict(position.start)
        blocks, read = stream.iter(size), False  # not iter(stream), which shares rows out to workers once more
        while block := _next(blocks):
            read, path_of_turn = True, f"{path}, turn {position.turn}"
            order = torch.randperm(len(block), generator=generator(seed, "stream", position.block, path_of_turn))
            for offset in range(position.offset, len(block)):
                yield replace(position, offset=offset + 1), block[int(order[offset])]
            position = replace(position, block=position.block + 1, offset=0, start=stream.state_dict())
        if not read and position.block == 0:
            raise DataError("a stream holds no examples.")
        position = replace(position, turn=position.turn + 1, block=0, offset=0, start=None)


def _next(blocks: Iterator[dict[str, list[Any]]]) -> list[dict[str, Any]]:
    """Rows of the next block; none at the end."""
    try:
        block = next(blocks, {})
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise DataError(f"a stream cannot be read on: {reason}.") from error
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
        fill: How examples become rows: each is one ("examples"), whole ones share a row until the next does not fit
            ("packs"), or all are laid end to end and cut into full rows ("chunks").
        block: Rows that are shuffled together.
        seed: Seed of their order.
        positions: Where workers go on, by number.
    """

    stream: datasets.IterableDataset
    encode: Encoder
    collate: Callable[[Sequence[Example]], Batch]
    batch_size: int
    max_length: int
    fill: Fill
    block: int
    seed: int
    positions: Mapping[int, Position]

    def __iter__(self) -> Iterator[tuple[int, Batch, Position]]:
        info = get_worker_info()
        worker = info.id if info else 0
        stream = self.stream.shard(info.num_workers, worker, contiguous=False) if info else self.stream
        examples = self._examples(worker, stream)
        rows = examples
        if self.fill != "examples":
            rows = self._packs(examples) if self.fill == "packs" else self._chunks(examples, worker)
        while True:
            batch = list(islice(rows, self.batch_size))
            yield worker, self.collate([example for _, example in batch]), batch[-1][0]

    def _examples(self, worker: int, stream: datasets.IterableDataset) -> Iterator[tuple[Position, Example]]:
        position = self.positions.get(worker, Position())
        since = position.turn  # when something was last found to learn
        counts = Counter(position.counts)
        before, first = position, position.part
        for after, row in shuffled(stream, self.block, self.seed, f"worker {worker}", replace(position, part=0)):
            if after.turn > since + 1:
                raise DataError("a stream holds no example that has anything to learn.")
            unreadable = row.pop(UNREADABLE, None)
            made = {} if unreadable else self.encode({name: [value] for name, value in row.items()}, [0])
            parts = [{name: values[n] for name, values in made.items()} for n in range(len(made.get("input_ids", ())))]
            if not parts and not after.turn:
                counts.update({"skipped" if unreadable else "dropped": 1})
            if unreadable and not after.turn:
                log.warning("left a row out: %s", unreadable)
            for number, part in enumerate(parts[first:], start=first + 1):
                lost = not part["input_ids"] or bool(part.get("lost"))
                whole = [] if lost else list(part["input_ids"])
                ids = whole if self.fill == "chunks" else whole[: self.max_length]
                if not after.turn:
                    kind = "skipped" if part.get("skipped") else "dropped" if lost else "examples"
                    counts.update({kind: 1, "truncated": int(len(ids) < len(whole) or bool(part.get("truncated")))})
                if not lost:
                    since = after.turn
                    labels = list(part["labels"]) if "labels" in part else ids
                    behind = after if number == len(parts) else replace(before, part=number)
                    example = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
                    yield replace(behind, used=0, counts=dict(counts)), example
            before, first = after, 0

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

    def _chunks(self, examples: Iterator[tuple[Position, Example]], worker: int) -> Iterator[tuple[Position, Example]]:
        """Full rows of all tokens end to end; each example is learned whole, and may begin in one and end in another.

        The position behind a chunk that ends inside an example is before that example, with how much of it is used.
        """
        held: list[int] = []
        before = self.positions.get(worker, Position())
        first = before.used
        for after, example in examples:
            ids, first = example["input_ids"][first:], 0
            while len(held) + len(ids) >= self.max_length:
                room = self.max_length - len(held)
                chunk, ids, held = [*held, *ids[:room]], ids[room:], []
                used = len(example["input_ids"]) - len(ids)
                behind = replace(before, used=used) if ids else after
                yield behind, {"input_ids": chunk, "attention_mask": [1] * len(chunk), "labels": chunk}
            held += ids
            before = after
