"""The data set that every Python installation carries: which part of the standard library does a text describe."""

from __future__ import annotations

from functools import cached_property

import datasets

from ll_demo.areas import AREA_NAMES
from ll_demo.docstrings import library_docstrings
from lora_lightning.data.sources.splits import in_fraction
from lora_lightning.data.text import TextData
from lora_lightning.data.tokens.encoding import encode_texts


class PyDocs(TextData):
    """Docstrings of the Python standard library and the area of the library that each describes: 8 classes.

    Needs no network: the sources of the running interpreter are read by syntax tree, never imported. A fifth of the
    texts, chosen by hash, is the validation split, and the test and predict split as well. `inputs` has the columns
    text, label and module.

    Args:
        max_length: Most tokens of a text.
        batch_size: Examples of a batch, per process.
        validation_batch_size: The same for validation, test and predict; null takes batch_size.
        tokenizer: Path, hub id or pkg:IMPORT_NAME/FOLDER. The command line fills in model.pretrained for null.
        num_workers: Processes that prepare batches beside the training; 0 prepares them in the training process.
        seed: Seed of the training order.
        limit: Use only so many examples of each split, taken at even steps, for a quick try.
    """

    task_kinds = ("sequence-classification",)

    def __init__(
        self,
        max_length: int = 48,
        batch_size: int = 16,
        validation_batch_size: int | None = None,
        tokenizer: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        limit: int | None = None,
        group_by_length: bool = True,
    ) -> None:
        super().__init__(
            max_length=max_length,
            batch_size=batch_size,
            validation_batch_size=validation_batch_size,
            tokenizer=tokenizer,
            num_workers=num_workers,
            seed=seed,
            limit=limit,
            group_by_length=group_by_length,
            validation_fraction=0.2,
        )
        self.label_names = AREA_NAMES
        self.num_labels = len(AREA_NAMES)

    def read(self, split: str) -> datasets.Dataset:
        """Texts of a split with label and module."""
        texts = self._library["text"]
        held_out = [in_fraction(text, self.validation_fraction) for text in texts]
        return self._library.select([row for row, held in enumerate(held_out) if held == (split != "train")])

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Token ids and label of each text."""
        examples = encode_texts(rows, ["text"], self.tokenizer_object, self.max_length)
        return examples if split == "predict" else examples.add_column("labels", rows["label"][:])

    @cached_property
    def _library(self) -> datasets.Dataset:
        return library_docstrings()
