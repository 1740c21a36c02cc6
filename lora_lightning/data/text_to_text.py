"""Source texts with their target texts: translation, summaries, questions with answers, conversions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets

from lora_lightning.data.batches.loader import count_labelled
from lora_lightning.data.sources.unread import COMPARED
from lora_lightning.data.text import TextData
from lora_lightning.data.tokens.encoding import tokenised
from lora_lightning.errors import check


class TextToText(TextData):
    """Sources and targets for an encoder-decoder model, with the loss on the target.

    Both are tokenised with the marks that the tokenizer puts around a text, the target as a target where that differs.
    Rows to predict need no target; where they have one, its loss is told beside the prediction.

    Batches: input_ids, attention_mask, labels (the target's tokens, -100 on padding), window_tokens.

    Args:
        source: Column of the source.
        target: Column of the target.
        prefix: Text before every source, such as "summarize: " for T5.
        max_target_length: Most tokens of a target; null takes max_length.
        common: Settings that all text data share.
    """

    task_kinds = ("seq2seq-lm",)

    def __init__(
        self,
        source: str = "source",
        target: str = "target",
        prefix: str = "",
        max_target_length: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.source = source
        self.target = target
        self.prefix = prefix
        self.max_target_length = self.max_length if max_target_length is None else max_target_length
        self.count = count_labelled
        check(self.max_target_length >= 2, self, "max_target_length", "it must be at least 2 tokens, or null.")

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows with the columns of source and, but for predict, target."""
        columns = {"TextToText.source": self.source}
        if split != "predict":
            columns["TextToText.target"] = self.target
        return self.sources.read(
            split, columns, texts=list(columns.values()), hold_out_by=[self.source], changing=COMPARED
        )

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:  # noqa: ARG002 - all splits alike
        """Token ids of each source, and of its target where it has one."""
        tokenizer, both = self.tokenizer_object, self.target in rows.column_names

        def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
            sources = [f"{self.prefix}{text}" for text in batch[self.source]]
            ids = tokenizer(sources, truncation=True, max_length=self.max_length)["input_ids"]
            columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "index": numbers}
            cut = [len(row) == self.max_length for row in ids]
            if both:
                targets = [str(text) for text in batch[self.target]]
                labels = tokenizer(text_target=targets, truncation=True, max_length=self.max_target_length)["input_ids"]
                cut = [c or len(row) == self.max_target_length for c, row in zip(cut, labels, strict=True)]
                columns["labels"] = labels
            return {**columns, "truncated": cut}

        return tokenised(rows, encode)

    def describe(self, example: Mapping[str, Any]) -> str:
        """Source and target, each on a line."""
        ids, labels, decode = example["input_ids"], example["labels"], self.tokenizer_object.decode
        return f"{len(ids)} tokens to {len(labels)}\nsource  {decode(ids)}\ntarget  {decode(labels)}"
