"""An optimizer around another one: what they share, what is saved, and former names of options."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import nn

from lora_lightning.optim.wrapper import OptimizerWrapper, adamw, former_names, innermost


class Counting(OptimizerWrapper):
    """Counts steps in each group; once it called the count otherwise."""

    former_fields: ClassVar[Mapping[str, str]] = {"times": "count"}
    own_copies: ClassVar[tuple[str, ...]] = ("start",)

    def __init__(self, inner):
        super().__init__(inner, {"limit": 3})
        for group in self.param_groups:
            group.setdefault("count", 0)

    def take_step(self):
        self.inner.step()
        for group in self.param_groups:
            group["count"] += 1


def made():
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    return parameter, Counting(adamw([parameter]))


def test_groups_and_state_are_the_inner_optimizers():
    _, wrapper = made()
    assert wrapper.param_groups is wrapper.inner.param_groups
    assert wrapper.state is wrapper.inner.state
    assert wrapper.defaults["inner"] == "AdamW"
    assert wrapper.defaults["limit"] == 3
    assert wrapper.copies == ("start",)
    assert not wrapper.clips_itself
    assert innermost(Counting(wrapper)) is wrapper.inner


def test_a_step_runs_the_closure_once_and_moves_as_the_inner_optimizer():
    parameter, wrapper = made()
    other = nn.Parameter(parameter.detach().clone())
    plain = adamw([other])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        parameter.grad = 2 * parameter.detach()
        return 5.0

    for _ in range(3):
        assert wrapper.step(closure) == 5.0
        other.grad = 2 * other.detach()
        plain.step()
        assert torch.equal(parameter, other)
    assert calls == [True] * 3
    assert wrapper.param_groups[0]["count"] == 3


@pytest.mark.parametrize("name", ["count", "times"])
def test_a_state_is_loaded_under_the_name_of_today(name):
    parameter, wrapper = made()
    parameter.grad = torch.ones(2)
    wrapper.step()
    saved = copy.deepcopy(wrapper.state_dict())
    for group in saved["param_groups"]:
        group[name] = group.pop("count")
    again, fresh = made()
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["count"] == 1
    assert "times" not in fresh.param_groups[0]
    assert fresh.param_groups is fresh.inner.param_groups
    assert torch.equal(fresh.state[again]["exp_avg"], wrapper.state[parameter]["exp_avg"])


def test_former_names_are_those_of_every_wrapper():
    _, wrapper = made()
    assert former_names(Counting(wrapper)) == {"times": "count"}
    assert former_names(wrapper.inner) == {}
