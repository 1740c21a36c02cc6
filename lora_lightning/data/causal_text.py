"""What the data of a causal language model share: token counts, packing, and streaming."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DistributedSampler

from lora_lightning.data.batches.collate import Collate
from lora_lightning.data.batches.loader import count_targets
from lora_lightning.data.batches.packing import PackSampler, best_fit
from lora_lightning.data.batches.stream_loader import StreamLoader
from lora_lightning.data.batches.streaming import Encoder, Fill, Position, StreamBatches
from lora_lightning.data.text import TextData, token_counts
from lora_lightning.errors import DataError, SettingsError, check

log = logging.getLogger(__name__)


class CausalText(TextData):
    """Text for a causal language model.

    Batches: input_ids, attention_mask, labels (-100 where there is no loss), window_tokens. Packed ones have
    position_ids, which start again with each example, in place of attention_mask.

    Args:
        packing: Put several training examples into one row of max_length tokens; batch_size then counts rows. No
            example sees another, and positions start anew, so that losses are those of unpacked examples. A model
            that cannot keep examples apart is refused before the first step.
        streaming: Read the training data while training, without end, for what does not fit on the disk or takes long
            to tokenise; trainer.max_steps says when to stop. Workers and ranks read files of their own where there are
            enough. `limit` means the first rows.
        shuffle_block: Rows of a stream that are shuffled together, and read again on resume.
        held_out_rows: Most rows that are held out of a stream for validation (by validation_fraction, where no
            validation data are named): the first ones. Those held out beyond are neither learned nor measured.
        common: Settings that all text data share.
    """

    task_kinds: tuple[str, ...] = ("causal-lm",)

    def __init__(
        self,
        *,
        packing: bool = False,
        streaming: bool = False,
        shuffle_block: int = 1000,
        held_out_rows: int = 1000,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.packing = packing
        self.streaming = streaming
        self.shuffle_block = shuffle_block
        self.held_out_rows = held_out_rows
        self._reader: StreamLoader | None = None
        self.count = count_targets
        check(not (packing and self.group_by_length), self, "packing", "it leaves nothing to group_by_length; use one.")
        check(shuffle_block >= 1, self, "shuffle_block", "it must be at least 1.")
        check(held_out_rows >= 1, self, "held_out_rows", "it must be at least 1; validation_fraction 0 holds none out.")
        if streaming:
            self._check_streaming()

    @abstractmethod
    def encoder(self, split: str) -> Encoder:
        """What makes examples of rows; without labels they are learned whole."""

    def sampler(self, examples: datasets.Dataset, batch_size: int, **options: Any) -> DistributedSampler[Any]:
        """Packed rows in training, where asked for."""
        if not (self.packing and options.get("shuffle")):
            return super().sampler(examples, batch_size, **options)
        return PackSampler(token_counts(examples), self.max_length, **options)

    def packs(self, split: str) -> int:
        """Rows that the examples of a split fill."""
        return len(best_fit(sorted(token_counts(self.examples(split)), reverse=True), self.max_length))

    def prepare(self, split: str) -> None:
        """Read and tokenise a split, or open the stream."""
        if self.streaming and split == "train":
            self.encoder(split)
            _ = self.stream
        else:
            super().prepare(split)

    def examples(self, split: str) -> datasets.Dataset:
        """The tokenised rows of a split.

        Raises:
            DataError: they are streamed.
        """
        if self.streaming and split == "train":
            raise DataError(
                f"{type(self).__name__}.streaming is True, so that nobody knows the training examples beforehand. To "
                "inspect some, set streaming to false and a limit."
            )
        return super().examples(split)

    def settle(self, split: str) -> None:
        """The encoder settles the chat template."""
        self.encoder(split)

    def facts(self) -> dict[str, dict[str, int]]:
        """Also of a stream: what became of the rows that have been read, each counted once."""
        found = super().facts()
        if self._reader is not None:
            counts = self._reader.counts()
            found["train"] = {name: counts[name] for name in ("examples", "truncated", "dropped", "skipped")}
        return found

    @cached_property
    def stream(self) -> datasets.IterableDataset:
        """The rows of the training data."""
        rows = self.read("train")
        if rows is None:
            raise DataError(f"{type(self).__name__}.train is null; name a file, a folder or a hub data set.")
        stream = cast(datasets.IterableDataset, rows)
        return stream if self.limit is None else stream.take(self.limit)

    @property
    def fill(self) -> Fill:
        """How examples of a stream become rows."""
        return "packs" if self.packing else "examples"

    def train_dataloader(self) -> Any:
        """Shuffled by epoch, or a stream; with an exact position for resume."""
        return self._stream_loader() if self.streaming else super().train_dataloader()

    def _check_streaming(self) -> None:
        check(not self.group_by_length, self, "streaming", "group_by_length needs all lengths; packing does not.")
        self.sources = replace(self.sources, streaming=True, held_out_rows=self.held_out_rows)

    def _stream_loader(self) -> StreamLoader:
        trainer = self.trainer
        options: dict[str, Any] = {}
        ranks = {"num_replicas": 1, "rank": 0}
        if trainer is not None:
            if trainer.max_steps < 1 or trainer.limit_train_batches != 1.0:
                raise SettingsError(
                    f"{type(self).__name__}.streaming is True, and a stream has no end: set trainer.max_steps, and "
                    f"leave trainer.limit_train_batches (now {trainer.limit_train_batches}) alone."
                )
            ranks = trainer.distributed_sampler_kwargs or ranks
            options["window"] = lambda: trainer.accumulate_grad_batches
            options["length"] = lambda: trainer.max_steps * trainer.accumulate_grad_batches
        rows = split_dataset_by_node(self.stream, ranks["rank"], ranks["num_replicas"])
        workers = min(self.num_workers, rows.num_shards)
        if workers < self.num_workers:
            log.warning(
                "%s: %d of %d workers read the stream, as it has %d files; more files keep more workers busy",
                type(self).__name__,
                workers,
                self.num_workers,
                rows.num_shards,
            )
        columns = ("input_ids", "labels", "position_ids") if self.packing else ("input_ids", "attention_mask", "labels")

        def make(positions: dict[int, Position]) -> StreamBatches:
            return StreamBatches(
                stream=rows,
                encode=self.encoder("train"),
                collate=Collate(self.tokenizer_object.pad_token_id, columns),
                batch_size=self.batch_size,
                max_length=self.max_length,
                fill=self.fill,
                block=self.shuffle_block,
                seed=self.seed,
                positions=positions,
            )

        self._reader = StreamLoader(make, workers=workers, count=self.count, **options)
        return self._reader
