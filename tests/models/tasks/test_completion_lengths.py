from __future__ import annotations

import torch

from lora_lightning.models.tasks.completion_lengths import completion_lengths

LABELS = torch.tensor([[-100, -100, 3, 1, 0], [-100, 4, -100, 2, -100], [2, -100, -100, -100, -100]])


def test_lengths_count_what_is_predicted():
    assert completion_lengths(LABELS).tolist() == [3, 2, 1]
