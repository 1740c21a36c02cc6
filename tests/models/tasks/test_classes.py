"""One class an example: loss, metrics and names."""

from __future__ import annotations

import pytest
import torch

from lora_lightning.models.tasks.classes import class_loss, class_metrics, count_classes, name_classes

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 2, 0, 0])


def test_loss_is_a_sum_with_its_count():
    loss = class_loss(LOGITS, LABELS)
    p = LOGITS.double().softmax(-1)
    assert float(loss.total) == pytest.approx(-sum(float(p[n, label].log()) for n, label in enumerate(LABELS)))
    assert int(loss.count) == 4
    assert class_loss(LOGITS.bfloat16(), LABELS).total.dtype == torch.float32


def test_metrics_of_batches_are_those_of_all():
    metrics = class_metrics(3)
    for part in (slice(0, 1), slice(1, 4)):
        count_classes(metrics, LOGITS[part], LABELS[part])
    assert float(metrics["accuracy"].compute()) == 0.75  # the third is taken for class 1
    f1 = (2 * 2 / (2 * 2 + 0 + 1) + 0.0 + 1.0) / 3
    assert float(metrics["f1"].compute()) == pytest.approx(f1)


def test_names_or_numbers_of_the_likeliest():
    rows = name_classes(LOGITS, ["a", "b", "c"])
    assert [row["prediction"] for row in rows] == ["a", "c", "b", "a"]
    assert rows[0]["probability"] == pytest.approx(float(LOGITS[0].softmax(0)[0]), abs=1e-6)
    assert [row["prediction"] for row in name_classes(LOGITS, [])] == ["0", "2", "1", "0"]
