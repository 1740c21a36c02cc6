"""One label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

from lora_lightning.tasks.base import Batch, Loss, PredictContext, Task


class SequenceClassification(Task):
    """Cross-entropy over classes; accuracy, macro F1 and Matthews correlation."""

    name: ClassVar[str] = "sequence-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def loss(self, logits: Tensor, batch: Batch) -> Loss:
        """Cross-entropy summed over examples."""
        labels = batch["labels"]
        return Loss(F.cross_entropy(logits.float(), labels, reduction="sum"), torch.tensor(len(labels)))

    def metrics(self, num_labels: int) -> dict[str, Metric]:
        """Accuracy over examples, F1 averaged over classes, Matthews correlation."""
        return {
            "accuracy": MulticlassAccuracy(num_labels, average="micro"),
            "f1": MulticlassF1Score(num_labels, average="macro"),
            "mcc": MulticlassMatthewsCorrCoef(num_labels),
        }

    def update(self, metrics: Mapping[str, Metric], logits: Tensor, batch: Batch) -> None:
        """Add predicted classes."""
        predicted = logits.argmax(-1)
        for metric in metrics.values():
            metric.update(predicted, batch["labels"])

    def predict(self, model: Any, batch: Batch, context: PredictContext) -> list[dict[str, Any]]:
        """Predicted label and its probability."""
        probabilities = self.logits(model, batch).float().softmax(-1)
        names = context.label_names or [str(i) for i in range(probabilities.shape[-1])]
        return [
            {"prediction": names[label], "probability": round(float(row[label]), 6)}
            for label, row in zip(probabilities.argmax(-1).tolist(), probabilities, strict=True)
        ]
