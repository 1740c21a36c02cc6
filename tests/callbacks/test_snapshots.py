"""Snapshots of values and optimizer state: what is in them, and writing them back."""

from __future__ import annotations

import torch
from torch import nn

from lora_lightning.callbacks import snapshots


def stepped() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    step(parameter, optimizer)
    return parameter, optimizer


def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    parameter.square().sum().backward()
    optimizer.step()


def test_a_snapshot_has_values_and_moments_of_its_own() -> None:
    parameter, optimizer = stepped()
    taken = snapshots.take({"a": parameter}, [optimizer])
    assert taken["a"].keys() == {"value", "exp_avg", "exp_avg_sq"}
    value = parameter.detach().clone()
    assert torch.equal(taken["a"]["value"], value)
    step(parameter, optimizer)
    assert torch.equal(taken["a"]["value"], value)
    assert not torch.equal(taken["a"]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_before_a_first_step_there_are_values_alone() -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert snapshots.take({"a": parameter}, [torch.optim.AdamW([parameter])])["a"].keys() == {"value"}


def test_writing_changes_what_it_names_in_place() -> None:
    parameter, optimizer = stepped()
    taken = snapshots.take({"a": parameter}, [optimizer])
    moment = optimizer.state[parameter]["exp_avg"]
    step(parameter, optimizer)
    second = optimizer.state[parameter]["exp_avg_sq"].clone()
    del taken["a"]["exp_avg_sq"]
    snapshots.write({"a": parameter}, [optimizer], taken)
    assert torch.equal(parameter, taken["a"]["value"])
    assert optimizer.state[parameter]["exp_avg"] is moment
    assert torch.equal(moment, taken["a"]["exp_avg"])
    assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], second)
