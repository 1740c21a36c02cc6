"""What an optimizer forgets of some parameters, and of no others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_lightning.errors import SettingsError
from lora_lightning.optim.state import clear, clear_copies, entry_state


def stepped():
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(params, lr=0.1)
    for parameter in params:
        parameter.grad = torch.ones(2)
    optimizer.step()
    return optimizer, *params


def test_a_cleared_parameter_takes_a_first_step_again():
    optimizer, first, second = stepped()
    clear(optimizer, [first])
    assert first not in optimizer.state
    assert optimizer.state[second]["step"] == 1
    before = first.detach().clone()
    optimizer.step()
    assert optimizer.state[first]["step"] == 1
    fresh = nn.Parameter(before.clone())
    fresh.grad = torch.ones(2)
    torch.optim.AdamW([fresh], lr=0.1).step()
    assert torch.equal(first, fresh)


def test_only_copies_go():
    optimizer, first, second = stepped()
    optimizer.copies = ("slow",)
    for parameter in (first, second):
        optimizer.state[parameter]["slow"] = torch.zeros(2)
    clear_copies(optimizer, [first])
    assert "slow" not in optimizer.state[first]
    assert {"exp_avg", "exp_avg_sq", "step"} <= optimizer.state[first].keys()
    assert "slow" in optimizer.state[second]


def test_what_the_optimizer_does_not_know_is_no_error():
    optimizer, *_ = stepped()
    clear(optimizer, [nn.Parameter(torch.ones(1))])
    clear_copies(optimizer, [nn.Parameter(torch.ones(1))])
    assert len(optimizer.state) == 2


def test_state_of_entries_is_what_has_the_shape_of_the_parameter():
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([parameter])
    assert entry_state(optimizer, parameter) == {}
    parameter.sum().backward()
    optimizer.step()
    assert entry_state(optimizer, parameter).keys() == {"exp_avg", "exp_avg_sq"}
    assert entry_state(optimizer, parameter)["exp_avg"] is optimizer.state[parameter]["exp_avg"]


def test_state_of_another_shape_is_refused_with_a_way_out():
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.Adafactor([parameter])
    parameter.sum().backward()
    optimizer.step()
    shape = r'Adafactor keeps "row_var" of shape \(3, 1\) for a parameter of shape \(3, 2\), so .* such as AdamW'
    with pytest.raises(SettingsError, match=shape):
        entry_state(optimizer, parameter)
