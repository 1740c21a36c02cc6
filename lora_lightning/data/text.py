"""What the text data modules share: splits read and tokenised once, and served in padded batches."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import datasets
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DistributedSampler

from lora_lightning.data.collate import MODEL_INPUTS, Collate
from lora_lightning.data.grouping import LengthGroupedSampler
from lora_lightning.data.loader import Batch, ResumableLoader
from lora_lightning.data.splits import Sources
from lora_lightning.data.tokenizers import load_tokenizer
from lora_lightning.errors import DataError, check

log = logging.getLogger(__name__)

STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


class TextData(LightningDataModule, ABC):
    """Text for a Hugging Face model. A subclass says what a split's rows are and how they become model inputs.

    Loaders shuffle by (seed, epoch) and share the rows out among the ranks. Batches are padded on the right to their
    longest row. A predict batch adds `index`, the row of `inputs("predict")` that each of its rows comes from.

    Args:
        train: Training data: a CSV, TSV, JSON, JSONL, Parquet or TXT file, a folder, or a hub id ("owner/name",
            "owner/name:config", "owner/name::split").
        validation: Validation data; null holds `validation_share` of the training data out.
        test: Test data.
        predict: Data for predict; null takes test, else validation.
        columns: Column names of CSV and TSV files that have no header line.
        validation_share: Share of the training texts held out where `validation` is null, chosen by a hash of the
            text and so the same in every run; 0 holds nothing out.
        tokenizer: Path, hub id or pkg:IMPORT_NAME/FOLDER. The command line fills in model.pretrained for null.
        max_length: Most tokens of an example. Batches are only as wide as their longest row.
        batch_size: Examples of a batch, per process.
        validation_batch_size: The same for validation, test and predict; null takes batch_size.
        num_workers: Processes that prepare batches beside the training; 0 prepares them in the training process.
        seed: Seed of the training order.
        limit: Use only so many examples of each split, for a quick try. They are taken at even steps, since many files
            are sorted by class.
    """

    task_kinds: tuple[str, ...]
    """Tasks that the batches serve."""

    def __init__(
        self,
        *,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        columns: Sequence[str] | None = None,
        validation_share: float = 0.1,
        tokenizer: str | None = None,
        max_length: int = 256,
        batch_size: int = 16,
        validation_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
        group_by_length: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.validation_batch_size = batch_size if validation_batch_size is None else validation_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.limit = limit
        self.validation_share = validation_share
        self.group_by_length = group_by_length
        check(max_length >= 2, self, "max_length", "it must be at least 2 tokens.")
        check(batch_size >= 1, self, "batch_size", "it must be at least 1.")
        check(self.validation_batch_size >= 1, self, "validation_batch_size", "it must be at least 1, or null.")
        check(num_workers >= 0, self, "num_workers", "it must be at least 0.")
        check(limit is None or limit >= 1, self, "limit", "it must be at least 1, or null for all examples.")
        check(0 <= validation_share < 1, self, "validation_share", "it must lie in [0, 1).")
        self.sources = Sources(
            owner=type(self).__name__,
            train=train,
            validation=validation,
            test=test,
            predict=predict,
            columns=columns,
            validation_share=validation_share,
        )
        self.count: Callable[[Batch], int] | None = None
        """Number whose sum over an accumulation window each training and validation batch carries."""
        self.dropped: dict[str, int] = {}
        """Rows left out because nothing in them can be learned, by split."""
        self._inputs: dict[str, datasets.Dataset | None] = {}
        self._examples: dict[str, datasets.Dataset] = {}

    @abstractmethod
    def read(self, split: str) -> datasets.Dataset | None:
        """Checked rows of "train", "validation", "test" or "predict"; None where the settings name no source."""

    @abstractmethod
    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Model inputs, with `index` (the row each comes from) and `truncated` (whether max_length cut it)."""

    def setup(self, stage: str) -> None:
        """Read and tokenise the splits of a stage; those that are there already are kept."""
        for split in STAGES[stage]:
            if stage == "fit" and split == "validation" and self._rows(split) is None:
                # how Lightning sees that there is none; an empty list of loaders would make it warn
                self.val_dataloader = None  # type: ignore[method-assign, assignment]
            else:
                self.examples(split)

    def inputs(self, split: str) -> datasets.Dataset:
        """The original rows of a split, in the order that `index` of a predict batch counts them.

        Raises:
            DataError: the settings name no source for it.
        """
        rows = self._rows(split)
        if rows is None:
            raise DataError(f"{type(self).__name__}.{split} is null; name a file, a folder or a hub data set.")
        return rows

    def examples(self, split: str) -> datasets.Dataset:
        """The tokenised rows of a split."""
        if split not in self._examples:
            self._examples[split] = self.encode(self.inputs(split), split)
        return self._examples[split]

    @property
    def ready(self) -> list[str]:
        """The splits that `setup` has tokenised."""
        return list(self._examples)

    @cached_property
    def tokenizer_object(self) -> Any:
        """The tokenizer that `tokenizer` names."""
        return load_tokenizer(self.tokenizer)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled by epoch, with an exact position for resume."""
        trainer = self.trainer
        options: dict[str, Any] = {}
        if trainer is not None:
            options = {"window": lambda: trainer.accumulate_grad_batches, "limit": trainer.limit_train_batches}
        return self._loader("train", self.batch_size, shuffle=True, **options)

    def val_dataloader(self) -> ResumableLoader:
        """In order. None in place of this method where the run has no validation data."""
        return self._loader("validation", self.validation_batch_size)

    def test_dataloader(self) -> ResumableLoader:
        """In order."""
        return self._loader("test", self.validation_batch_size)

    def predict_dataloader(self) -> ResumableLoader:
        """In order, with `index` in each batch."""
        return self._loader("predict", self.validation_batch_size, columns=(*MODEL_INPUTS, "index"))

    def count_dropped(self, split: str, rows: datasets.Dataset, encoded: datasets.Dataset, setting: str) -> None:
        """Keep and log how many rows `encoded` left out.

        Raises:
            DataError: it left all of them out, for lack of text in the column that `setting` names.
        """
        self.dropped[split] = len(rows) - len(encoded)
        if not len(encoded):
            column = getattr(self, setting)
            raise DataError(
                f'{type(self).__name__}.{setting} is "{column}"; no {split} row has a token in that column.'
            )
        if self.dropped[split]:
            count = f"{self.dropped[split]} of {len(rows)} {split} rows"
            log.warning("%s: left %s out: no %s", type(self).__name__, count, setting)

    def _rows(self, split: str) -> datasets.Dataset | None:
        if split not in self._inputs:
            rows = self.read(split)
            if rows is not None and self.limit is not None and self.limit < len(rows):
                rows = rows.select([n * len(rows) // self.limit for n in range(self.limit)])
            self._inputs[split] = rows
        return self._inputs[split]

    def _loader(
        self,
        split: str,
        batch_size: int,
        *,
        shuffle: bool = False,
        columns: Sequence[str] = MODEL_INPUTS,
        **options: Any,
    ) -> ResumableLoader:
        examples = self.examples(split)
        ranks = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        if self.num_workers:  # workers do not tokenise; unset, each of them prints that it was forked after tokenising
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return ResumableLoader(
            examples,
            count=self.count,
            batch_size=batch_size,
            sampler=self._sampler(examples, batch_size, shuffle=shuffle, seed=self.seed, **ranks),
            collate_fn=Collate(self.tokenizer_object.pad_token_id, columns),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def _sampler(self, examples: datasets.Dataset, batch_size: int, **options: Any) -> DistributedSampler[Any]:
        if not self.group_by_length:
            return DistributedSampler(examples, **options)
        lengths = [len(ids) for ids in examples.with_format(None)["input_ids"]]
        return LengthGroupedSampler(lengths, batch_size, **options)
