"""One label for an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lora_lightning.models.tasks.base import Batch, Loss, PredictContext, Task
from lora_lightning.models.tasks.classes import class_loss, class_metrics, count_classes, name_classes, score_classes


class ImageClassification(Task):
    """Cross-entropy over classes; accuracy, macro F1 and Matthews correlation."""

    name: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def example(self, config: Any, size: int, length: int) -> dict[str, Tensor]:  # noqa: ARG002 - an image has none
        """Black images of the size that the model takes."""
        side, colours = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
        sides = (side, side) if isinstance(side, int) else tuple(side)
        pixels = torch.zeros(size, colours, *sides)
        return {"pixel_values": pixels, "labels": torch.zeros(size, dtype=torch.int64)}

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
