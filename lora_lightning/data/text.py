"""What the text data modules share: rows tokenised once, and padded batches."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import datasets
from torch.utils.data import DistributedSampler

from lora_lightning.data.batches.collate import Collate
from lora_lightning.data.batches.grouping import LengthGroupedSampler
from lora_lightning.data.sources.token_cache import cache_key, load, store
from lora_lightning.data.table import Collation, TableData
from lora_lightning.data.tokens.marks import mark
from lora_lightning.data.tokens.tokenizers import load_tokenizer
from lora_lightning.errors import DataError, check
from lora_lightning.models.new_tokens import check_new, initialize_rows

log = logging.getLogger(__name__)

WORTH_KEEPING = 2.0
"""Seconds of tokenising from which on the result is kept on the disk."""
SERVING = {
    "batch_size",
    "cache",
    "dropped",
    "group_by_length",
    "held_out_rows",
    "num_workers",
    "packing",
    "seed",
    "shuffle_block",
    "streaming",
    "tokenizer",  # its contents count, not its place
    "trainer",
    "validation_batch_size",
}
"""Settings that examples do not depend on."""


class TextData(TableData):
    """Text for a Hugging Face model. Batches are padded on the right to their longest row.

    What `encode` makes has the columns `index` (the row each example comes from) and `truncated` (whether max_length
    cut it) beside the model's inputs.

    Args:
        tokenizer: Path, hub id or pkg:IMPORT_NAME/FOLDER. The command line fills in model.pretrained for null.
        max_length: Most tokens of an example. Batches are only as wide as their longest row.
        new_tokens: Texts that become one token each, such as "<tool>"; their rows in the model train, and the adapter
            folder keeps them with the tokenizer.
        group_by_length: Put texts of similar length into one batch, so that less of it is padding.
        cache: Keep tokenised data on the disk if they took more than seconds, beside the tables that `datasets` caches
            (in its folder lora_lightning/tokens, which can be deleted at any time, and which drops what was not used
            for longest beyond LORA_LIGHTNING_CACHE_GB, 10 by default). They are found again only by the same contents,
            tokenizer, settings and code.
        common: Settings that all data share.
    """

    def __init__(
        self,
        *,
        tokenizer: str | None = None,
        max_length: int = 256,
        new_tokens: Sequence[str] = (),
        group_by_length: bool = False,
        cache: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.tokenizer = tokenizer
        self.new_tokens = list(new_tokens)
        self.max_length = max_length
        self.group_by_length = group_by_length
        self.cache = cache
        check(max_length >= 2, self, "max_length", "it must be at least 2 tokens.")
        self.dropped: dict[str, int] = {}
        """Rows left out because nothing in them can be learned, by split."""

    @cached_property
    def tokenizer_object(self) -> Any:
        """The tokenizer that `tokenizer` names, with the new tokens."""
        tokenizer = self.read_tokenizer()
        if self.new_tokens:
            check_new(tokenizer, self.new_tokens)
            initialize_rows(tokenizer, self.new_tokens)
        return tokenizer

    def read_tokenizer(self) -> Any:
        """The tokenizer as it lies where `tokenizer` says."""
        return load_tokenizer(self.tokenizer)

    def settle(self, split: str) -> None:
        """Bring the tokenizer into the state in which it encodes a split; a chat template, for one, becomes its own."""

    def examples(self, split: str) -> datasets.Dataset:
        """The tokenised rows of a split, from the disk if they are there."""
        if split not in self._examples and self.cache:
            self._examples[split] = self._cached(split)
        return super().examples(split)

    def _cached(self, split: str) -> datasets.Dataset:
        """Examples from the disk, or made, and kept there if that took long."""
        rows = self._placed(split)
        self.settle(split)
        names = list(getattr(self, "label_names", ())) if split != "predict" else []
        settings = {"split": split, "kind": type(self).__name__, "label_names": names, **self._settings()}
        key = cache_key(rows, self.tokenizer_object, settings)
        if (known := load(key)) is not None:
            examples, self.dropped[split] = known
            if self.dropped[split]:
                rule = "for lack of anything to learn"
                log.warning("%s: left %d %s rows out %s", type(self).__name__, self.dropped[split], split, rule)
            return examples
        began, faults = time.monotonic(), self.sources.faults.total()
        examples = self.encode(rows, split)
        # rows that encoding has left out are counted by encoding them
        if time.monotonic() - began >= WORTH_KEEPING and self.sources.faults.total() == faults:
            store(key, examples, self.dropped.get(split, 0))
        return examples

    def _settings(self) -> dict[str, Any]:
        """Settings that examples may depend on: plain ones, but for those that only say how they are served."""
        plain = (str, int, float, bool, list, dict, type(None))
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {name: value for name, value in public.items() if isinstance(value, plain) and name not in SERVING}

    def collation(self, split: str, columns: Sequence[str], sampler: DistributedSampler[Any]) -> Collation:  # noqa: ARG002 - the same for every split
        """Padding to the longest row."""
        return self.padding(columns)

    def padding(self, columns: Sequence[str]) -> Collate:
        """Collation that pads `columns` to the longest row."""
        if self.num_workers:  # workers do not tokenise; unset, each of them prints that it was forked after tokenising
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return Collate(self.tokenizer_object.pad_token_id, columns)

    def sampler(self, examples: datasets.Dataset, batch_size: int, **options: Any) -> DistributedSampler[Any]:
        """Any order, or one that groups texts of similar length."""
        if not self.group_by_length:
            return DistributedSampler(examples, **options)
        return LengthGroupedSampler(token_counts(examples), batch_size, **options)

    def describe(self, example: Mapping[str, Any]) -> str:
        """The text with its label, or with the tokens that carry no loss in double brackets."""
        ids, labels = example["input_ids"], example["labels"]
        if isinstance(labels, list):
            return f"{len(ids)} tokens\n{mark(ids, labels, self.tokenizer_object)}"
        names = getattr(self, "label_names", ())
        return f"label {names[labels] if names else labels}\n{self.tokenizer_object.decode(ids)}"

    def facts(self) -> dict[str, dict[str, int]]:
        """Counts of each split that is ready.

        `examples` are those that are used, `truncated` those of them that max_length cut. `dropped` rows hold nothing
        to learn. `skipped` rows cannot be read.
        """
        return {
            split: {
                "examples": len(self.examples(split)),
                "truncated": sum(self.examples(split)["truncated"]),
                "dropped": self.dropped.get(split, 0),
                "skipped": self.sources.faults.count(split),
            }
            for split in self.ready
        }

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


def token_counts(examples: datasets.Dataset) -> list[int]:
    """Tokens of each example."""
    return [len(ids) for ids in examples.with_format(None)["input_ids"]]
