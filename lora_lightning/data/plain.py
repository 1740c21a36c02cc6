"""Raw text: a causal language model learns every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from lora_lightning.data.batches.streaming import Encoder, Fill
from lora_lightning.data.causal_text import CausalText
from lora_lightning.data.tokens.causal import end_id, plain_ids, start_ids
from lora_lightning.data.tokens.encoding import tokenised
from lora_lightning.errors import check

Tokens = NDArray[np.integer[Any]]


class PlainText(CausalText):
    """Documents for a causal language model, with the loss on every token.

    Each document ends in an end-of-text token. With `block`, all documents are laid end to end and cut into chunks of
    max_length tokens, the last one short; `index` then counts the chunks. A chunk is one text to the model: tokens see
    the end of the document before theirs, by design. Otherwise, and in predict, a row is an example, cut to max_length
    on the right; with `packing` documents share a row without seeing one another.

    Args:
        text: Column of the text.
        block: Cut the joined documents into full chunks, so that no batch is padded. Not together with packing.
        common: Settings that all text data share.
    """

    def __init__(self, text: str = "text", block: bool = True, **common: Any) -> None:
        super().__init__(**common)
        self.text = text
        self.block = block
        check(not (block and self.packing), self, "packing", "documents must stay whole for it: set block to false.")

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows with the text column."""
        return self.sources.read(split, {"PlainText.text": self.text}, texts=[self.text], hold_out_by=[self.text])

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Token ids of each row or chunk."""
        documents = tokenised(rows, self.encoder(split))
        self.count_dropped(split, rows, documents, "text")
        lines = documents.with_format("numpy")["input_ids"][:]
        if self.block and split != "predict":
            chunks = chunked(np.concatenate(lines), self.max_length)
            return _examples(chunks, range(len(chunks)), [False] * len(chunks))
        cut = [ids[: self.max_length] for ids in lines]
        return _examples(cut, documents["index"][:], [len(ids) > self.max_length for ids in lines])

    @property
    def fill(self) -> Fill:
        """Chunks, unless documents stay whole."""
        return "chunks" if self.block else super().fill

    def encoder(self, split: str) -> Encoder:  # noqa: ARG002 - the same for every split
        """Token ids of documents with a text."""
        start, end = start_ids(self.tokenizer_object), end_id(self.tokenizer_object)

        def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            texts = plain_ids(self.tokenizer_object, [str(text) for text in batch[self.text]])
            documents = [(number, [*start, *text, end]) for number, text in zip(numbers, texts, strict=True) if text]
            return {"index": [number for number, _ in documents], "input_ids": [ids for _, ids in documents]}

        return encode


def chunked(ids: Tokens, length: int) -> list[Tokens]:
    """`ids` in chunks of `length`; a last chunk of a single token has nothing to predict and is left out."""
    return [ids[first : first + length] for first in range(0, len(ids) - 1, length)]


def _examples(chunks: list[Tokens], index: Sequence[int], truncated: list[bool]) -> datasets.Dataset:
    masks = [np.ones_like(chunk) for chunk in chunks]
    columns = {"input_ids": chunks, "attention_mask": masks, "labels": chunks}
    return datasets.Dataset.from_dict({**columns, "index": list(index), "truncated": truncated})
