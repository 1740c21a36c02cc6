"""One label for each word of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lora_lightning.models.tasks.base import IGNORED, Batch, Loss, PredictContext, Task


class TokenClassification(Task):
    """Cross-entropy over the tokens that carry a label, a word's first; accuracy and macro F1 over words."""

    name: ClassVar[str] = "token-classification"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    metric: ClassVar[str] = "f1"
    higher_is_better: ClassVar[bool] = True
    per_token: ClassVar[bool] = True

    def loss(self, logits: Tensor, batch: Batch) -> Loss:
        """Cross-entropy summed over labelled tokens."""
        labels = batch["labels"]
        total = F.cross_entropy(logits.float().mT, labels, ignore_index=IGNORED, reduction="sum")
        return Loss(total, (labels != IGNORED).sum())

    def metrics(self, num_labels: int) -> dict[str, Metric]:
        """Accuracy over words, F1 averaged over classes."""
        return {
            "accuracy": MulticlassAccuracy(num_labels, average="micro", ignore_index=IGNORED),
            "f1": MulticlassF1Score(num_labels, average="macro", ignore_index=IGNORED),
        }

    def update_metrics(self, metrics: Mapping[str, Metric], logits: Tensor, batch: Batch) -> None:
        """Add predicted classes."""
        predicted = logits.argmax(-1).flatten()
        for metric in metrics.values():
            metric.update(predicted, batch["labels"].flatten())

    def predict(self, model: Any, batch: Batch, context: PredictContext) -> list[dict[str, Any]]:
        """The tags of each text's words, with blanks between; words that were cut off have none."""
        predicted, marked = self.logits(model, batch).argmax(-1), batch["labels"] != IGNORED
        number = predicted.max() + 1 if predicted.numel() else 0
        names = context.label_names or [str(i) for i in range(int(number))]
        return [
            {"prediction": " ".join(names[tag] for tag in tags[mask].tolist())}
            for tags, mask in zip(predicted, marked, strict=True)
        ]
