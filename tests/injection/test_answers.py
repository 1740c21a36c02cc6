"""Answers from data: what keeps nothing asks anew each time."""

from __future__ import annotations

import torch

from lora_lightning.injection.answers import Answer, asked_anew
from lora_lightning.injection.probe import Probe


def test_nothing_is_kept():
    asked = []

    def make() -> Answer:
        asked.append(1)
        return Answer({"a": {"rank": 2}}, {"0.lora_A": torch.ones(1)})

    first, again = (asked_anew(Probe(), "plan", make, {}) for _ in range(2))
    assert len(asked) == 2
    assert first.plain == again.plain == {"a": {"rank": 2}}
