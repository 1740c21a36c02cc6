"""Loss and metrics by scikit-learn's, and predictions by name."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, label_ranking_average_precision_score, log_loss

from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import PredictContext


def test_multi_label(measured):
    task = find_task("multi-label-classification", {"threshold": 0.4})
    logits, labels = torch.randn(40, 4), torch.randint(0, 2, (40, 4)).float()
    values = measured(
        task, [(a, {"labels": b}) for a, b in zip(logits.split(16), labels.split(16), strict=True)], labels=4
    )
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    y, predicted = labels.int().numpy(), p >= 0.4
    assert values == pytest.approx(
        {
            "loss": np.mean([log_loss(y[:, i], p[:, i]) for i in range(4)]),
            "f1": f1_score(y, predicted, average="macro"),
            "f1_micro": f1_score(y, predicted, average="micro"),
            "exact_match": accuracy_score(y, predicted),
            "ranking": label_ranking_average_precision_score(y, p),
        },
        abs=1e-6,
    )
    assert task.model_options(4)["problem_type"] == "multi_label_classification"


def test_multi_label_predictions_are_names():
    def net(**inputs):
        return SimpleNamespace(logits=torch.tensor([[2.0, -3.0, 0.5], [-1.0, -1.0, -1.5]]))

    rows = find_task("multi-label-classification").predict(net, {}, PredictContext(label_names=["a", "b", "c"]))
    assert [row["prediction"] for row in rows] == ["a, c", ""]
    assert rows[0]["probabilities"] == "a 0.881, c 0.622, b 0.047"
