"""The loss token by token; the generated texts are in test_generated."""

from __future__ import annotations

import pytest
import torch

from lora_lightning.models.tasks import find_task


def test_causal_lm_counts_labelled_tokens_only(measured):
    task = find_task("causal-lm")
    logits, labels = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    labels[0, :3], labels[1, 4:] = -100, -100
    total, count = 0.0, 0
    for row in range(2):
        for t in range(1, 6):
            if labels[row, t] != -100:
                scores = logits[row, t - 1].double()
                total += float(scores.exp().sum().log() - scores[labels[row, t]])
                count += 1
    loss = task.loss(logits, {"labels": labels})
    assert int(loss.count) == count == 6
    assert float(loss.total) == pytest.approx(total, rel=1e-6)
    assert measured(task, [(logits, {"labels": labels})]) == pytest.approx({"loss": total / count}, rel=1e-6)
