"""Loss by its formula, metrics by scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lora_lightning.models.tasks import find_task


def test_classification(measured):
    task = find_task("sequence-classification")
    logits, labels = torch.randn(50, 3), torch.randint(0, 3, (50,))
    values = measured(task, [(part, {"labels": y}) for part, y in zip(logits.split(20), labels.split(20), strict=True)])
    log_p = logits.double() - logits.double().exp().sum(1, keepdim=True).log()
    predicted = logits.argmax(1)
    assert values == pytest.approx(
        {
            "loss": -float(log_p[range(50), labels].mean()),
            "accuracy": accuracy_score(labels, predicted),
            "f1": f1_score(labels, predicted, average="macro"),
            "mcc": matthews_corrcoef(labels, predicted),
        },
        abs=1e-6,
    )
