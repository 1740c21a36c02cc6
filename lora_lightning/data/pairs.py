"""Pairs of texts that belong together, or with a score of how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lora_lightning.data.batches.collate import Collate
from lora_lightning.data.labels import score
from lora_lightning.data.sources.faults import RowError
from lora_lightning.data.sources.unread import Changing
from lora_lightning.data.table import Collation
from lora_lightning.data.text import TextData
from lora_lightning.data.tokens.encoding import tokenised
from lora_lightning.errors import check

SIDES = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class CollateSides:
    """Collation of rows that hold several texts each: first all first texts, then all second ones, and so on.

    The batch carries `sides`, the number of texts of a row; its other tensors have one entry a row.

    Args:
        inner: Collation of texts.
        each: Columns that hold one list for each text of a row.
    """

    inner: Collate
    each: tuple[str, ...] = SIDES

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One tensor per column."""
        sides = len(rows[0]["input_ids"])
        texts: list[dict[str, Any]] = []
        for side in range(sides):
            texts += [{name: row[name][side] for name in self.each if name in row} for row in rows]
        rest = [{name: value for name, value in row.items() if name not in self.each} for row in rows]
        return {**self.inner(texts), **self.inner(rest), "sides": torch.tensor(sides)}


class TextPairs(TextData):
    """Pairs of texts: an anchor and what belongs to it; or two texts and a score of how near they are.

    Without scores the other pairs of a batch serve as negatives, so a text should stand once. Rows to predict may have
    an anchor only; each then gets its vector.

    Batches: input_ids, attention_mask and token_type_ids of all anchors, then all positives, then all negatives;
    sides (how many of these there are); labels (float32 scores, where there are any).

    Args:
        anchor: Column of the first text.
        positive: Column of the text that belongs to it, or that is scored with it.
        negative: Column of a text that is near and does not belong to it; null takes those of the other pairs only.
        score: Column of a number from -1 to 1 that the pair's cosine shall have; null where all pairs belong together.
        common: Settings that all text data share.
    """

    def __init__(
        self,
        anchor: str = "anchor",
        positive: str = "positive",
        negative: str | None = None,
        score: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.anchor = anchor
        self.positive = positive
        self.negative = negative
        self.score = score
        self.task_kinds = ("sentence-similarity",) if score else ("sentence-embedding",)
        self.measures_rows = score is not None
        check(not (score and negative), self, "negative", "pairs with a score have none; set one of them to null.")
        check(not self.group_by_length, self, "group_by_length", "pairs meet by chance, for the sake of negatives.")

    def read(self, split: str) -> datasets.Dataset | None:
        """Rows with the texts and, but for predict, the score; rows to predict need no more than an anchor."""
        wanted = {"anchor": self.anchor, "positive": self.positive, "negative": self.negative, "score": self.score}
        if split == "predict":
            wanted = {"anchor": self.anchor, "positive": self.positive if self.score else None}
        columns = {f"TextPairs.{setting}": column for setting, column in wanted.items() if column is not None}
        texts = [column for setting, column in columns.items() if setting != "TextPairs.score"]
        judged = [self.score] if self.score is not None and split != "predict" else []
        judge = self._score if judged else None
        advice = "Pairs belong together unless data.score names the column"
        scores = {} if self.score else dict.fromkeys(("label", "score", "similarity"), Changing("weight", advice))
        return self.sources.read(
            split, columns, texts=texts, hold_out_by=texts, judge=judge, judged=judged, changing=scores
        )

    def encode(self, rows: datasets.Dataset, split: str) -> datasets.Dataset:
        """Token ids of each text of a row; and its score."""
        sides = [c for c in (self.anchor, self.positive, self.negative) if c is not None and c in rows.column_names]

        def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
            texts = [
                self.tokenizer_object([str(t) for t in batch[c]], truncation=True, max_length=self.max_length)
                for c in sides
            ]
            names = [name for name in SIDES if name in texts[0]]
            columns = {name: [list(row) for row in zip(*(t[name] for t in texts), strict=True)] for name in names}
            cut = [any(len(ids) == self.max_length for ids in row) for row in columns["input_ids"]]
            return {**columns, "index": numbers, "truncated": cut}

        examples = tokenised(rows, encode)
        if self.score is None or split == "predict":
            return examples
        return examples.add_column("labels", [self._score({self.score: value}) for value in rows[self.score]])

    def _score(self, row: Mapping[str, Any]) -> float:
        where = f'TextPairs.score, column "{self.score}"'
        number = score(row[str(self.score)], where)
        if not -1 <= number <= 1:
            raise RowError(
                "with a score that is no cosine",
                f"{where}: {number:g} is no cosine; a score must lie in [-1, 1]. Divide a scale from 0 to 5 by 5",
            )
        return number

    def collation(self, split: str, columns: Sequence[str], sampler: DistributedSampler[Any]) -> Collation:  # noqa: ARG002 - the same for every split
        """Texts side after side."""
        return CollateSides(self.padding(columns))

    def describe(self, example: Mapping[str, Any]) -> str:
        """Each text of the row on a line."""
        names = [f"score {example['labels']:g}"] if "labels" in example else []
        texts = [self.tokenizer_object.decode(ids) for ids in example["input_ids"]]
        sides = zip(("anchor", "positive", "negative"), texts, strict=False)
        return "\n".join(["".join(names), *(f"{name:<9} {text}" for name, text in sides)])
