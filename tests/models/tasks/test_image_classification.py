"""The example that memory is counted with, and what it has in common with texts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import PredictContext


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"image_size": 8, "num_channels": 1}, (2, 1, 8, 8)),
        ({"image_size": (6, 4)}, (2, 3, 6, 4)),
        ({}, (2, 3, 224, 224)),
    ],
)
def test_example(config, shape):
    batch = find_task("image-classification").example(SimpleNamespace(**config), 2, 99)
    assert tuple(batch["pixel_values"].shape) == shape
    assert batch["labels"].tolist() == [0, 0]


def test_loss_metrics_and_predictions_are_those_of_texts(measured):
    logits, labels = torch.randn(20, 3), torch.randint(0, 3, (20,))
    images, texts = find_task("image-classification"), find_task("sequence-classification")
    batches = [(logits, {"labels": labels})]
    assert measured(images, batches) == measured(texts, batches)
    net = lambda **_: SimpleNamespace(logits=logits)  # noqa: E731 - a model of one line
    context = PredictContext(label_names=["a", "b", "c"])
    assert images.predict(net, {}, context) == texts.predict(net, {}, context)
