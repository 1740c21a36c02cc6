"""One number for a text or a pair of texts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torchmetrics import Metric
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef

from lora_lightning.models.tasks.base import Batch, Loss, PredictContext, Task


class Regression(Task):
    """Squared error; Pearson and Spearman correlation."""

    name: ClassVar[str] = "regression"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "pearson"
    higher_is_better: ClassVar[bool] = True

    def model_options(self, num_labels: int | None) -> dict[str, Any]:  # noqa: ARG002 - always one output
        """One output."""
        return {"num_labels": 1, "problem_type": "regression"}

    def loss(self, logits: Tensor, batch: Batch) -> Loss:
        """Squared error summed over examples."""
        labels = batch["labels"].float()
        return Loss(F.mse_loss(logits.float().squeeze(-1), labels, reduction="sum"), torch.tensor(len(labels)))

    def metrics(self, num_labels: int) -> dict[str, Metric]:  # noqa: ARG002 - always one output
        """Mean squared error and two correlations."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*save all targets and predictions.*")  # two numbers an example
            spearman = SpearmanCorrCoef()
        return {"pearson": PearsonCorrCoef(), "spearman": spearman, "mse": MeanSquaredError()}

    def update_metrics(self, metrics: Mapping[str, Metric], logits: Tensor, batch: Batch) -> None:
        """Add predicted numbers."""
        for metric in metrics.values():
            metric.update(logits.float().squeeze(-1), batch["labels"].float())

    def predict(self, model: Any, batch: Batch, context: PredictContext) -> list[dict[str, Any]]:  # noqa: ARG002
        """The predicted number."""
        return [{"prediction": round(value, 6)} for value in self.logits(model, batch).float().squeeze(-1).tolist()]
