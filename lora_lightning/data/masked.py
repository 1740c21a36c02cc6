"""Texts with some tokens masked: a masked language model learns to put them back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from torch import Tensor
from torch.utils.data import DistributedSampler

from lora_lightning.data.batches.collate import Collate
from lora_lightning.data.batches.loader import count_labelled
from lora_lightning.data.table import Collation
from lora_lightning.data.text import TextData
from lora_lightning.data.tokens.causal import NO_LOSS
from lora_lightning.data.tokens.encoding import encode_texts
from lora_lightning.data.tokens.marks import mark
from lora_lightning.errors import DataError, check

SPLITS = ("train", "validation", "test", "predict")
MASKED, RANDOM = 0.8, 0.1
"""Of the chosen tokens, the fractions that are masked and replaced at random; the rest stays (arXiv:1810.04805)."""


@dataclass(frozen=True)
class Masking:
    """Which tokens of a row are hidden, as a function of (seed, split, epoch, row) whatever process asks."""

    fraction: float
    mask_id: int
    special: frozenset[int]
    """Tokens that are never chosen."""
    vocabulary: int
    seed: int
    split: str

    def __call__(self, row: Mapping[str, Any], epoch: int) -> dict[str, Any]:
        """The row with input_ids as the model sees them, and labels where a token is to be found.

        A row that holds a mask already is to be filled by the model: nothing of it is hidden, and it has no labels.
        """
        ids = list(row["input_ids"])
        labels = [NO_LOSS] * len(ids)
        places = [place for place, token in enumerate(ids) if token not in self.special]
        if not places or self.mask_id in ids:
            return {**row, "labels": labels}
        random = np.random.default_rng([self.seed, SPLITS.index(self.split), epoch, row["index"]])
        count = max(1, round(self.fraction * len(places)))
        for place in random.choice(places, count, replace=False).tolist():
            labels[place] = ids[place]
            fate = random.random()
            if fate < MASKED:
                ids[place] = self.mask_id
            elif fate < MASKED + RANDOM:
                ids[place] = int(random.integers(self.vocabulary))
        return {**row, "input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class CollateMasked:
    """Masking, then padding. `epoch` is asked when a batch is made; workers are started anew in every epoch."""

    inner: Collate
    masking: Masking
    epoch: Callable[[], int]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One tensor per column."""
        epoch = self.epoch()
        return self.inner([self.masking(row, epoch) for row in rows])


@dataclass(frozen=True)
class EpochOf:
    """The epoch that a sampler is in; always 0 where masks are fixed."""

    sampler: DistributedSampler[Any]
    fixed: bool

    def __call__(self) -> int:
        """The number, from 0."""
        return 0 if self.fixed else self.sampler.epoch


class MaskedText(TextData):
    """Texts for a masked language model. Training hides other tokens in every epoch, validation always the same ones.

    What is hidden is a function of (seed, epoch, row) alone, so that a resumed run sees what it would have seen. Of a
    text to predict that holds the tokenizer's mask token ("[MASK]" or "<mask>") that token is filled in; of others, as
    in validation, hidden ones are put back and their loss is told.

    Batches: input_ids, attention_mask, token_type_ids, labels (-100 where nothing is to be found), window_tokens.

    Args:
        text: Column of the text.
        mask_fraction: Fraction of a text's tokens that is hidden; at least one. 0.15 is usual, more for larger models.
        common: Settings that all text data share.
    """

    task_kinds = ("masked-lm",)

    def __init__(self, text: str = "text", mask_fraction: float = 0.15, **common: Any) -> None:
        super().__init__(**common)
        self.text = text
        self.mask_fraction = mask_fraction
        self.count = count_labelled
        check(0 < mask_fraction < 1, self, "mask_fraction", "it must lie in (0, 1).")

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows with the text column."""
        return self.sources.read(split, {"MaskedText.text": self.text}, texts=[self.text], hold_out_by=[self.text])

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Token ids of each text that has any; nothing is hidden yet."""
        encoded = encode_texts(rows, [self.text], self.tokenizer_object, self.max_length)
        special = self._masking(split).special - {self.tokenizer_object.mask_token_id}
        full = [row for row, ids in enumerate(encoded["input_ids"]) if not special.issuperset(ids)]
        kept = encoded if len(full) == len(encoded) or split == "predict" else encoded.select(full)
        self.count_dropped(split, rows, kept, "text")
        return kept

    def collation(self, split: str, columns: Sequence[str], sampler: DistributedSampler[Any]) -> Collation:
        """Padding, with tokens hidden anew in each epoch of training."""
        return CollateMasked(self.padding(columns), self._masking(split), EpochOf(sampler, fixed=split != "train"))

    def describe(self, example: Mapping[str, Any]) -> str:
        """The text as the first epoch hides parts of it, and what is to be found."""
        row = self._masking("train")(example, 0)
        tokenizer = self.tokenizer_object
        wanted = [token for token in row["labels"] if token != NO_LOSS]
        shown = mark(row["input_ids"], row["labels"], tokenizer)
        return f"{len(row['input_ids'])} tokens, to be found: {' '.join(map(tokenizer.decode, wanted))}\n{shown}"

    def _masking(self, split: str) -> Masking:
        tokenizer = self.tokenizer_object
        if tokenizer.mask_token_id is None:
            raise DataError(
                f'data.tokenizer is "{self.tokenizer}"; it has no mask token, which masked-lm data hide tokens behind.'
            )
        return Masking(
            fraction=self.mask_fraction,
            mask_id=tokenizer.mask_token_id,
            special=frozenset(tokenizer.all_special_ids),
            vocabulary=len(tokenizer),
            seed=self.seed,
            split=split,
        )
