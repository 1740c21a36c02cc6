"""The rate's schedule against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from lora_lightning.errors import SettingsError
from lora_lightning.optim.warmup import WarmUp


def rates(schedule: WarmUp, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule.schedule(optimizer, total)
    used = []
    for _ in range(total):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize(
    ("decay", "after"),
    [
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: 0.5 * (1 + math.cos(math.pi * done))),
        ("constant", lambda done: 1.0),
    ],
)
def test_warm_up_then_decay(decay, after):
    used = rates(WarmUp(warmup_fraction=0.2, decay=decay), 20)
    expected = [2 * (i + 1) / 5 for i in range(4)] + [2 * after(i / 16) for i in range(16)]
    assert used == pytest.approx(expected, abs=1e-12)
    assert all(rate > 0 for rate in used)


def test_without_warm_up_the_first_rate_is_the_base_rate():
    assert rates(WarmUp(warmup_fraction=0.0), 4) == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_a_fraction_outside_its_rule():
    with pytest.raises(SettingsError, match=r"WarmUp.warmup_fraction is 1.0; it must lie in \[0, 1\)"):
        WarmUp(warmup_fraction=1.0)
