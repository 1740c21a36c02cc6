"""One class an example: what the tasks on texts and on images share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

from lora_lightning.models.tasks.base import Loss


def class_loss(logits: Tensor, labels: Tensor) -> Loss:
    """Cross-entropy summed over examples."""
    return Loss(F.cross_entropy(logits.float(), labels, reduction="sum"), torch.tensor(len(labels)))


def class_metrics(num_labels: int) -> dict[str, Metric]:
    """Accuracy over examples, F1 averaged over classes, Matthews correlation."""
    return {
        "accuracy": MulticlassAccuracy(num_labels, average="micro"),
        "f1": MulticlassF1Score(num_labels, average="macro"),
        "mcc": MulticlassMatthewsCorrCoef(num_labels),
    }


def count_classes(metrics: Mapping[str, Metric], logits: Tensor, labels: Tensor) -> None:
    """Add predicted classes."""
    predicted = logits.argmax(-1)
    for metric in metrics.values():
        metric.update(predicted, labels)


def score_classes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each example is right, and 1."""
    return (logits.argmax(-1) == labels).float(), torch.ones(len(labels), device=logits.device)


def name_classes(logits: Tensor, label_names: Sequence[str]) -> list[dict[str, Any]]:
    """The likeliest class and its probability."""
    probabilities = logits.float().softmax(-1)
    names = label_names or [str(i) for i in range(probabilities.shape[-1])]
    return [
        {"prediction": names[label], "probability": round(float(row[label]), 6)}
        for label, row in zip(probabilities.argmax(-1).tolist(), probabilities, strict=True)
    ]
