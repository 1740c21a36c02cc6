"""What all data modules share: splits read and prepared once, and served in batches that continue exactly."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DistributedSampler

from lora_lightning.data.batches.collate import MODEL_INPUTS
from lora_lightning.data.batches.loader import Batch, ResumableLoader
from lora_lightning.data.batches.packing import Packs, PackSampler
from lora_lightning.data.batches.process_rows import EachOnce, equal_batches
from lora_lightning.data.identity import files_digest, rows_digest, settings_of, source_names
from lora_lightning.data.sources.faults import Faults, OnError
from lora_lightning.data.sources.lines import Reading
from lora_lightning.data.sources.splits import Source, Sources, identity, in_fraction
from lora_lightning.data.sources.stored import PLACE
from lora_lightning.errors import DataError, SettingsError, check

log = logging.getLogger(__name__)

STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}

Collation = Callable[[Sequence[Any]], Batch]


class TableData(LightningDataModule, ABC):
    """Rows of a table for a Hugging Face model. A subclass says what they are and how they become model inputs.

    Loaders shuffle by (seed, epoch) and share the rows out among the ranks. A predict batch adds `index`, the row of
    `inputs("predict")` that each of its rows comes from.

    Args:
        train: Training data: a CSV, TSV, JSON, JSONL, Parquet or TXT file (text also packed: .gz, .bz2, .xz, .zst), a
            folder, or a hub id ("owner/name", "owner/name:config", "owner/name::split"), or a table made on the spot
            ("builtin:NAME"). Several are given as a list, or with weights, {a.jsonl: 2, b.jsonl: 1}: each row then
            comes from a source with a probability after its weight, until all rows of all sources have come.
        validation: Validation data; null holds `validation_fraction` of the training data out.
        test: Test data.
        predict: Data for predict; null takes test, else validation.
        columns: Column names of CSV and TSV files that have no header line.
        encoding: Encoding of text files, such as cp1252 (Excel on Windows); null takes what a byte order mark tells,
            else UTF-8.
        ignore: Columns that are taken away as they are read. One that would weigh, mask or leave out examples elsewhere
            (weight, train, loss_mask, ...) is an error where it would change what is learned, unless it stands here.
        separator: What stands between the fields of CSV and TSV files, such as ";"; null takes a comma and a tab.
        validation_fraction: Fraction of the training examples held out where `validation` is null, chosen by a hash of
            what they hold and so the same in every run; 0 holds nothing out.
        batch_size: Examples of a batch, per process.
        validation_batch_size: The same for validation, test and predict; null takes batch_size. Several processes may
            take a few less, so that all have as many batches.
        num_workers: Processes that prepare batches beside the training; 0 prepares them in the training process.
        seed: Seed of the training order.
        limit: Use only so many examples of each split, for a quick try. They are taken at even steps, since many files
            are sorted by class.
        on_error: What to do with a row that cannot be read or used: raise, naming its file and line, or skip it and
            count. Counts come by kind.
    """

    task_kinds: tuple[str, ...]
    """Tasks that the batches serve."""
    measures_rows: bool = True
    """Whether metrics are of each row by itself. Where they compare rows, all processes get as many of them."""

    def __init__(
        self,
        *,
        train: Source | None = None,
        validation: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        columns: Sequence[str] | None = None,
        encoding: str | None = None,
        separator: str | None = None,
        ignore: Sequence[str] | None = None,
        validation_fraction: float = 0.1,
        batch_size: int = 16,
        validation_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.validation_batch_size = batch_size if validation_batch_size is None else validation_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.limit = limit
        self.validation_fraction = validation_fraction
        check(batch_size >= 1, self, "batch_size", "it must be at least 1.")
        check(self.validation_batch_size >= 1, self, "validation_batch_size", "it must be at least 1, or null.")
        check(num_workers >= 0, self, "num_workers", "it must be at least 0.")
        check(limit is None or limit >= 1, self, "limit", "it must be at least 1, or null for all examples.")
        check(0 <= validation_fraction < 1, self, "validation_fraction", "it must lie in [0, 1).")
        self.sources = Sources(
            owner=type(self).__name__,
            train=train,
            validation=validation,
            test=test,
            predict=predict,
            how=Reading(None if columns is None else tuple(columns), encoding, self._separator(separator)),
            validation_fraction=validation_fraction,
            ignore=tuple(ignore or ()),
            faults=Faults(on_error),
        )
        self.count: Callable[[Batch], int] | None = None
        """Number whose sum over an accumulation window each training and validation batch carries."""
        self._told: dict[str, str] = {}
        self._inputs: dict[str, datasets.Dataset | None] = {}
        self._held_out = 0.0
        self._examples: dict[str, datasets.Dataset] = {}

    def _separator(self, given: str | None) -> str | None:
        mark = {"\\t": "\t", "tab": "\t"}.get(given or "", given)
        if mark is not None and (len(mark) != 1 or mark in '"\r\n'):
            raise SettingsError(
                f'{type(self).__name__}.separator is {given!r}; it must be one character, such as ";", or null.'
            )
        return mark

    @abstractmethod
    def read(self, split: str) -> datasets.Dataset | None:
        """Checked rows of "train", "validation", "test" or "predict"; None where the settings name no source."""

    @abstractmethod
    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """What batches are made of, with `index` (the row each example comes from)."""

    @abstractmethod
    def collation(self, split: str, columns: Sequence[str], sampler: DistributedSampler[Any]) -> Collation:
        """What makes one batch, with `columns` where they exist, of examples of a split that `sampler` orders."""

    @abstractmethod
    def describe(self, example: Mapping[str, Any]) -> str:
        """One prepared training example as people read it, for `inspect-data`."""

    def readable(self, row: dict[str, Any]) -> dict[str, Any]:
        """An input row with its predictions, in words where it holds numbers."""
        return row

    def sampler(self, examples: datasets.Dataset, batch_size: int, **options: Any) -> DistributedSampler[Any]:  # noqa: ARG002 - some orders need it
        """The order of a split's examples, a function of (seed, epoch)."""
        return DistributedSampler(examples, **options)

    def setup(self, stage: str) -> None:
        """Read and prepare the splits of a stage; those that are there already are kept.

        Raises:
            DataError: the model has another task than the data, or see `read` and `encode`.
        """
        module = getattr(self.trainer, "lightning_module", None)
        task = getattr(getattr(module, "task", None), "name", None)
        if isinstance(task, str) and task not in self.task_kinds:
            serve = " and ".join(self.task_kinds)
            raise DataError(
                f'model.task is "{task}", but the data ({type(self).__name__}) serve {serve}; set model.task to '
                f'"{self.task_kinds[0]}", or give other data.'
            )
        for split in STAGES[stage]:
            if stage == "fit" and split == "validation" and self._rows(split) is None:
                # how Lightning sees that there is none; an empty list of loaders would make it warn
                self.val_dataloader = None  # type: ignore[method-assign, assignment]
            else:
                self.prepare(split)
        self._tell_faults()
        self.announce(stage)

    def _tell_faults(self) -> None:
        """Log what was left out, by kind, where that has changed."""
        for field in self.sources.faults.found:
            told = self.sources.faults.told(field)
            if told and told != self._told.get(field):
                log.warning("%s: rows of %s were left out: %s", type(self).__name__, field, told)
            self._told[field] = told

    def announce(self, stage: str) -> None:
        """Say what is in the data of a stage, once they are ready."""

    def prepare(self, split: str) -> None:
        """Read and prepare one split."""
        self.examples(split)

    def inputs(self, split: str) -> datasets.Dataset:
        """The original rows of a split, in the order that `index` of a predict batch counts them.

        Raises:
            DataError: the settings name no source for it.
        """
        rows = self._placed(split)
        return rows.remove_columns(PLACE) if PLACE in rows.column_names else rows

    def places(self, rows: datasets.Dataset) -> list[str]:
        """Where each row stands, as messages say it: file and line, or its number where it comes of no file."""
        if PLACE not in rows.column_names:
            return [f"row {row} (counted from 0)" for row in range(len(rows))]
        return [self.sources.faults.places.words(int(place)) for place in rows[PLACE]]

    def examples(self, split: str) -> datasets.Dataset:
        """The prepared rows of a split."""
        if split not in self._examples:
            self._examples[split] = self.encode(self._placed(split), split)
        return self._examples[split]

    @property
    def ready(self) -> list[str]:
        """The splits that `setup` has prepared."""
        return list(self._examples)

    def training_identity(self) -> dict[str, Any]:
        """What a resumed run must share, as plain data: the settings of the examples, and the training rows."""
        streams = getattr(self, "streaming", False)
        rows = files_digest(source_names(self.sources.train)) if streams else rows_digest(self.inputs("train"))
        return {**settings_of(self), "training data": rows}

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

    def _placed(self, split: str) -> datasets.Dataset:
        """The rows of a split with the column `PLACE`, where they have one."""
        rows = self._rows(split)
        if rows is None:
            raise DataError(f"{type(self).__name__}.{split} is null; name a file, a folder or a hub data set.")
        return rows

    def hold_out(self, fraction: float) -> None:
        """Validate on a fraction of the training rows, and train on the others; `validation` is not read.

        Rows are chosen by a hash of what they hold, another one than that of `validation_fraction`. For what is chosen
        by results, such as a learning rate, so that validation rows stay unseen.

        Raises:
            DataError: the training data are a stream, or prepared already.
        """
        if getattr(self, "streaming", False):
            raise DataError(
                f"{type(self).__name__}.streaming is true, and of a stream no fraction can be held out for tuning; set "
                "it to false, or give the settings that would be tuned."
            )
        if self._inputs:
            raise DataError(f"{type(self).__name__} has read its rows already; hold_out comes before setup.")
        self._held_out = fraction

    def _rows(self, split: str) -> datasets.Dataset | None:
        if split not in self._inputs:
            if self._held_out and split in ("train", "validation"):
                self._inputs |= self._parted(self._limited("train"))
            else:
                self._inputs[split] = self._limited(split)
        return self._inputs[split]

    def _limited(self, split: str) -> datasets.Dataset | None:
        rows = self.read(split)
        if rows is not None and self.limit is not None and self.limit < len(rows):
            return rows.select([n * len(rows) // self.limit for n in range(self.limit)])
        return rows

    def _parted(self, rows: datasets.Dataset | None) -> dict[str, datasets.Dataset | None]:
        """Training and validation rows, as `hold_out` asks for."""
        if rows is None:
            return {"train": None, "validation": None}
        names = list(getattr(self, "input_columns", {}).values()) or [n for n in rows.column_names if n != PLACE]
        texts = [" ".join(identity(row[name]) for name in names) for row in rows.select_columns(names)]
        out = [in_fraction(f"held out to tune: {text}", self._held_out) for text in texts]
        if all(out) or not any(out):
            raise DataError(
                f"{type(self).__name__}.train has {len(rows)} rows, too few to hold {self._held_out:g} of them out for "
                "tuning; give more rows."
            )
        return {
            split: rows.select([row for row, is_out in enumerate(out) if is_out == (split == "validation")])
            for split in ("train", "validation")
        }

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
        sampler = self.sampler(examples, batch_size, shuffle=shuffle, seed=self.seed, **ranks)
        if split in ("validation", "test") and self.measures_rows:
            rows, processes = len(examples), sampler.num_replicas
            if rows < processes:
                raise DataError(
                    f"{type(self).__name__}.{split} has {rows} rows, fewer than the {processes} processes that share "
                    "them; give more rows, or fewer devices."
                )
            sampler, batch_size = EachOnce(sampler), equal_batches(rows, processes, batch_size)
        return ResumableLoader(
            Packs(examples) if isinstance(sampler, PackSampler) else examples,
            count=self.count,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=self.collation(split, columns, sampler),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            **options,
        )
