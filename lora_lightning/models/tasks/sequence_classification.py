"""One label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import Metric

from lora_lightning.models.tasks.base import Batch, Loss, PredictContext, Task
from lora_lightning.models.tasks.classes import class_loss, class_metrics, count_classes, name_classes, score_classes


class SequenceClassification(Task):
    """Cross-entropy over classes; accuracy, macro F1 and Matthews correlation."""

    name: ClassVar[str] = "sequence-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def loss(self, logits: Tensor, batch: Batch) -> Loss:
        """Cross-entropy summed over examples."""
        return class_loss(logits, batch["labels"])

    def metrics(self, num_labels: int) -> dict[str, Metric]:
        """Accuracy over examples, F1 averaged over classes, Matthews correlation."""
        return class_metrics(num_labels)

    def update_metrics(self, metrics: Mapping[str, Metric], logits: Tensor, batch: Batch) -> None:
        """Add predicted classes."""
        count_classes(metrics, logits, batch["labels"])

    def score_rows(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Whether each example is right."""
        return score_classes(logits, batch["labels"])

    def predict(self, model: Any, batch: Batch, context: PredictContext) -> list[dict[str, Any]]:
        """Predicted label and its probability."""
        return name_classes(self.logits(model, batch), context.label_names)
