"""Loss by its formula, metrics by scikit-learn's, over labelled tokens."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from lora_lightning.models.tasks import find_task


def test_token_classification_counts_labelled_tokens_only(measured):
    task = find_task("token-classification")
    logits, labels = torch.randn(4, 6, 3), torch.randint(0, 3, (4, 6))
    labels[:, 0], labels[1, 3:] = -100, -100
    values = measured(task, [(a, {"labels": b}) for a, b in zip(logits.split(3), labels.split(3), strict=True)])
    keep = labels != -100
    log_p = logits.double().log_softmax(-1)
    true, predicted = labels[keep], logits.argmax(-1)[keep]
    assert values == pytest.approx(
        {
            "loss": -float(log_p[keep][range(len(true)), true].mean()),
            "accuracy": accuracy_score(true, predicted),
            "f1": f1_score(true, predicted, average="macro"),
        },
        abs=1e-6,
    )
