"""The line of the header on the rate: how high, of which optimizer, who chose it, and what follows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_lightning.optim.warmup import WarmUp
from lora_lightning.training import rate_origin
from lora_lightning.training.rate_origin import rate_line


@pytest.fixture(autouse=True)
def _a_hundred_steps(monkeypatch):
    monkeypatch.setattr(rate_origin, "total_steps", lambda trainer: 100)


def run(*optimizers):
    return SimpleNamespace(optimizers=list(optimizers))


class Project(nn.Module):
    """A project of somebody's, which makes its optimizer itself."""


def test_one_rate_and_who_chose_it():
    one = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    assert rate_line(run(one), Project(), "from mine.yaml") == "rate: 0.02 of SGD, from mine.yaml"
    assert rate_line(run(one), Project()) == "rate: 0.02 of SGD, from Project.configure_optimizers"
    assert rate_line(run(), Project()) == ""


def test_groups_of_other_rates_are_named():
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": rate, "name": name} for name, rate in (("A", 1), ("B", 2))
    ]
    line = rate_line(run(torch.optim.AdamW(groups)), Project())
    assert line.startswith("rate: 1, 2 (B) of AdamW")


@pytest.mark.parametrize(
    ("fraction", "said"), [(0.1, "warm-up over 10 of 100 steps, then linear"), (0.0, "no warm-up, then")]
)
def test_the_schedule_is_named(fraction, said):
    module = Project()
    module.lr_scheduler = WarmUp(warmup_fraction=fraction)
    assert said in rate_line(run(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)), module)
