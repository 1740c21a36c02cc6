"""The cosine of a pair, its loss and its correlations."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from lora_lightning.models.tasks import find_task


def test_sentence_similarity(measured, two_sides):
    task = find_task("sentence-similarity")
    net, batch, _ = two_sides
    cosines = task.logits(net, batch)
    sides = find_task("sentence-embedding").logits(net, batch)
    assert torch.allclose(cosines, (sides[0] * sides[1]).sum(-1))
    labels = torch.tensor([0.1, -0.2, 0.9])
    values = measured(task, [(cosines, {"labels": labels})])
    assert values["loss"] == values["mse"] == pytest.approx(float(((cosines - labels) ** 2).mean()), rel=1e-5)
    assert values["spearman"] == pytest.approx(spearmanr(cosines, labels)[0], abs=1e-5)
