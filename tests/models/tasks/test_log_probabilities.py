from __future__ import annotations

import pytest
import torch

from lora_lightning.models.tasks.log_probabilities import completion_lengths, completion_log_probabilities

LABELS = torch.tensor([[-100, -100, 3, 1, 0], [-100, 4, -100, 2, -100], [2, -100, -100, -100, -100]])


def by_hand(logits, labels):
    """Token by token."""
    found = []
    for row, targets in zip(logits.double(), labels.tolist(), strict=True):
        pairs = [(place, target) for place, target in enumerate(targets) if place and target != -100]
        found.append(sum(float(row[place - 1].log_softmax(-1)[target]) for place, target in pairs))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_labelled_tokens_are_summed_in_each_row(dtype):
    logits = (3 * torch.randn(3, 5, 6)).to(dtype).requires_grad_()
    found = completion_log_probabilities(logits, LABELS)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), by_hand(logits.detach(), LABELS), atol=1e-5, rtol=1e-5)
    found.sum().backward()
    learned = logits.grad.abs().sum(-1) > 0
    assert learned.tolist() == [[False, True, True, True, False], [True, False, True, False, False], [False] * 5]


def test_lengths_count_what_is_predicted():
    assert completion_lengths(LABELS).tolist() == [3, 2, 1]
