"""Vectors of texts, trained on pairs that belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torchmetrics import MeanMetric, Metric

from lora_lightning.errors import check
from lora_lightning.models.tasks.base import Batch, Loss, PredictContext, Task
from lora_lightning.models.tasks.gathering import gather
from lora_lightning.models.tasks.pooling import POOLINGS, Pooling, embed, example_pairs


@dataclass(frozen=True, kw_only=True)
class SentenceEmbedding(Task):
    """Each anchor must find its positive among all positives (and negatives) of the batch, and the other way round.

    InfoNCE (arXiv:1807.03748) with the other pairs of the batch as negatives, averaged over both directions. What it
    asks grows with batch_size, and so do its metrics. The batches of several processes are one: each finds its partners
    among the texts of all of them.
    """

    temperature: float = 0.05
    """Divides the cosines: the lower, the more the nearest wrong texts count; usually 0.01 to 0.1."""
    pooling: Pooling = "mean"
    """"mean" over the attention mask, or the "first" token."""

    name: ClassVar[str] = "sentence-embedding"
    auto_class: ClassVar[str] = "AutoModel"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    has_head: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = ("pooler",)

    def __post_init__(self) -> None:
        check(self.temperature > 0, self, "temperature", "it must be positive.")
        check(self.pooling in POOLINGS, self, "pooling", 'it must be "mean" or "first".')

    def example(self, config: Any, size: int, length: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Pairs of texts."""
        return example_pairs(size, length)

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Unit vectors: (sides, pairs, width); sides are anchors, positives and, where there are any, negatives."""
        return embed(model, batch, self.pooling)

    def loss(self, logits: Tensor, batch: Batch) -> Loss:  # noqa: ARG002 - a pair's place is its label
        """Cross-entropy of the right partner, averaged over both directions, summed over the pairs of this process."""
        every, mine = gather(logits)
        right = _places(logits, mine)
        there = F.cross_entropy(logits[0] @ _candidates(every).T / self.temperature, right, reduction="sum")
        back = F.cross_entropy(logits[1] @ every[:, 0].flatten(0, 1).T / self.temperature, right, reduction="sum")
        return Loss((there + back) / 2, torch.tensor(len(right)))

    def metrics(self, num_labels: int) -> dict[str, Metric]:  # noqa: ARG002 - vectors have no labels
        """Fraction of anchors whose nearest text of the batch is their own, and the mean reciprocal rank of it."""
        return {"accuracy": MeanMetric(), "mrr": MeanMetric()}

    def update_metrics(self, metrics: Mapping[str, Metric], logits: Tensor, batch: Batch) -> None:  # noqa: ARG002
        """Add the rank of each positive; a text that is as near counts as nearer."""
        ranks = _ranks(logits)
        metrics["accuracy"].update((ranks == 1).float())
        metrics["mrr"].update(1 / ranks.float())

    def score_rows(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Whether the positive of each anchor is its nearest."""
        right = (_ranks(logits) == 1).float()
        return right, torch.ones_like(right)

    def predict(self, model: Any, batch: Batch, context: PredictContext) -> list[dict[str, Any]]:  # noqa: ARG002
        """Cosine of each pair; where there are single texts, their vectors."""
        sides = self.logits(model, batch)
        if len(sides) == 1:
            return [{"embedding": [round(value, 6) for value in vector]} for vector in sides[0].tolist()]
        names = ("similarity", "similarity_negative")
        cosines = [(sides[0] * other).sum(-1).tolist() for other in sides[1:]]
        return [
            {name: round(value, 6) for name, value in zip(names, row, strict=False)}
            for row in zip(*cosines, strict=True)
        ]


def _candidates(every: Tensor) -> Tensor:
    """All positives, process by process, then all negatives: (candidates, width)."""
    return every.transpose(0, 1)[1:].flatten(0, 2)


def _places(sides: Tensor, process: int) -> Tensor:
    """Where the positives of a process are among those of all."""
    pairs = sides.shape[1]
    return torch.arange(pairs, device=sides.device) + process * pairs


def _ranks(logits: Tensor) -> Tensor:
    """Rank of each positive among all candidates; a text that is as near counts as nearer."""
    every, mine = gather(logits)
    cosines = logits[0] @ _candidates(every).T
    return (cosines >= cosines.gather(1, _places(logits, mine).unsqueeze(1))).sum(1)
