"""Any number of labels for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torchmetrics import Metric
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score, MultilabelRankingAveragePrecision

from lora_lightning.errors import check
from lora_lightning.models.tasks.base import Batch, Loss, PredictContext, Task


@dataclass(frozen=True, kw_only=True)
class MultiLabelClassification(Task):
    """Binary cross-entropy over examples and labels; F1, exact match, and how high the right labels rank."""

    threshold: float = 0.5
    """Probability from which a label counts as predicted."""

    name: ClassVar[str] = "multi-label-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "f1"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(0 < self.threshold < 1, self, "threshold", "it must lie in (0, 1).")

    def model_options(self, num_labels: int | None) -> dict[str, Any]:
        """Labels that do not exclude one another."""
        return {"num_labels": num_labels, "problem_type": "multi_label_classification"} if num_labels else {}

    def example(self, config: Any, size: int, length: int) -> dict[str, Tensor]:
        """With a number for each label."""
        return {**super().example(config, size, length), "labels": torch.zeros(size, config.num_labels)}

    def loss(self, logits: Tensor, batch: Batch) -> Loss:
        """Binary cross-entropy summed over examples and labels."""
        labels = batch["labels"]
        total = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
        return Loss(total, torch.tensor(labels.numel()))

    def metrics(self, num_labels: int) -> dict[str, Metric]:
        """F1 averaged over labels and over all decisions, fraction of examples wholly right, ranking precision."""
        return {
            "f1": MultilabelF1Score(num_labels, average="macro", threshold=self.threshold),
            "f1_micro": MultilabelF1Score(num_labels, average="micro", threshold=self.threshold),
            "exact_match": MultilabelExactMatch(num_labels, threshold=self.threshold),
            "ranking": MultilabelRankingAveragePrecision(num_labels),
        }

    def update_metrics(self, metrics: Mapping[str, Metric], logits: Tensor, batch: Batch) -> None:
        """Add predicted probabilities."""
        probabilities = logits.float().sigmoid()
        for metric in metrics.values():
            metric.update(probabilities, batch["labels"].long())

    def predict(self, model: Any, batch: Batch, context: PredictContext) -> list[dict[str, Any]]:
        """The predicted labels with commas between, and the probability of every label, highest first."""
        probabilities = self.logits(model, batch).float().sigmoid()
        names = context.label_names or [str(i) for i in range(probabilities.shape[-1])]
        rows = []
        for row in probabilities.tolist():
            ranked = sorted(zip(row, names, strict=True), reverse=True)
            chosen = [name for probability, name in zip(row, names, strict=True) if probability >= self.threshold]
            every = ", ".join(f"{name} {probability:.3f}" for probability, name in ranked)
            rows.append({"prediction": ", ".join(chosen), "probabilities": every})
        return rows
