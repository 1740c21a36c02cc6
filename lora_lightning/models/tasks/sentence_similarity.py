"""Vectors of texts, trained on pairs with a score each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torchmetrics import Metric
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef

from lora_lightning.errors import check
from lora_lightning.models.tasks.base import Batch, Loss, PredictContext, Task
from lora_lightning.models.tasks.pooling import POOLINGS, Pooling, embed, example_pairs


@dataclass(frozen=True, kw_only=True)
class SentenceSimilarity(Task):
    """The cosine of a pair must equal its score: squared error; Spearman and Pearson correlation."""

    pooling: Pooling = "mean"
    """"mean" over the attention mask, or the "first" token."""

    name: ClassVar[str] = "sentence-similarity"
    auto_class: ClassVar[str] = "AutoModel"
    metric: ClassVar[str] = "spearman"
    higher_is_better: ClassVar[bool] = True
    has_head: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = ("pooler",)

    def __post_init__(self) -> None:
        check(self.pooling in POOLINGS, self, "pooling", 'it must be "mean" or "first".')

    def example(self, config: Any, size: int, length: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Pairs of texts."""
        return example_pairs(size, length)

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The cosine of each pair: (pairs,)."""
        sides = embed(model, batch, self.pooling)
        return (sides[0] * sides[1]).sum(-1)

    def loss(self, logits: Tensor, batch: Batch) -> Loss:
        """Squared error summed over pairs."""
        return Loss(F.mse_loss(logits, batch["labels"].float(), reduction="sum"), torch.tensor(len(logits)))

    def metrics(self, num_labels: int) -> dict[str, Metric]:  # noqa: ARG002 - vectors have no labels
        """Two correlations and the mean squared error."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*save all targets and predictions.*")  # two numbers a pair
            spearman = SpearmanCorrCoef()
        return {"spearman": spearman, "pearson": PearsonCorrCoef(), "mse": MeanSquaredError()}

    def update_metrics(self, metrics: Mapping[str, Metric], logits: Tensor, batch: Batch) -> None:
        """Add cosines."""
        for metric in metrics.values():
            metric.update(logits, batch["labels"].float())

    def predict(self, model: Any, batch: Batch, context: PredictContext) -> list[dict[str, Any]]:  # noqa: ARG002
        """The cosine of each pair."""
        return [{"similarity": round(value, 6)} for value in self.logits(model, batch).tolist()]
