"""Loss and perplexity over hidden tokens, and fillings."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import PredictContext


def test_masked_lm_counts_hidden_tokens_only(measured):
    task = find_task("masked-lm")
    logits, labels = torch.randn(4, 6, 11), torch.full((4, 6), -100)
    labels[0, 2], labels[1, 1], labels[1, 4], labels[3, 5] = 3, 10, 0, 7
    logits[0, 2, 3] = 9.0
    values = measured(task, [(a, {"labels": b}) for a, b in zip(logits.split(2), labels.split(2), strict=True)])
    keep = labels != -100
    log_p, true = logits[keep].double().log_softmax(-1), labels[keep]
    mean = -float(log_p[range(4), true].mean())
    accuracy = float((log_p.argmax(-1) == true).double().mean())
    assert values == pytest.approx({"loss": mean, "accuracy": accuracy, "perplexity": np.exp(mean)}, rel=1e-5)
    assert 0 < accuracy < 1


def test_masked_lm_fills_in():
    words = ["[PAD]", "[MASK]", "the", "dog", "sleeps"]
    tokenizer = SimpleNamespace(
        mask_token_id=1, decode=lambda ids, **_: " ".join(words[int(i)] for i in ids if int(i) or len(ids) == 1)
    )
    logits = torch.zeros(2, 3, 5)
    logits[0, 1, 3], logits[0, 1, 4], logits[1, 0, 2] = 4.0, 2.0, 3.0
    batch = {
        "input_ids": torch.tensor([[2, 1, 4], [4, 3, 0]]),
        "labels": torch.tensor([[-100, -100, -100], [2, -100, -100]]),  # "the dog", with a random word in its place
    }
    task = find_task("masked-lm", {"top": 2})
    asked, hidden = task.predict(lambda **_: SimpleNamespace(logits=logits), batch, PredictContext(tokenizer=tokenizer))
    probabilities = torch.tensor([0, 0, 0, 4.0, 2.0]).softmax(0)
    assert asked == {
        "prediction": "the dog sleeps",
        "fillings": f"dog {probabilities[3]:.3f}, sleeps {probabilities[4]:.3f}",
        "loss": None,
    }
    assert hidden["prediction"] == "the dog"
    assert hidden["loss"] == pytest.approx(np.log(4 + np.exp(3)) - 3, abs=1e-6)
