from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_lightning.models.tasks.base import metrics, update_metrics


@pytest.fixture
def measured():
    def measured(task, batches, labels: int = 3) -> dict[str, float]:
        """All metrics of batches, each its logits and the rest."""
        model = SimpleNamespace(config=SimpleNamespace(num_labels=labels))
        collection = metrics(task, model)
        for logits, batch in batches:
            update_metrics(task, collection, logits, batch)
        return {name: float(value) for name, value in collection.compute().items()}

    return measured


@pytest.fixture
def two_sides():
    """A model whose hidden states are given, a batch of three pairs of texts, and the hidden states."""
    hidden = torch.randn(6, 4, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]] * 2)
    batch = {"input_ids": mask, "attention_mask": mask, "sides": torch.tensor(2)}
    return (lambda **inputs: SimpleNamespace(last_hidden_state=hidden)), batch, hidden
