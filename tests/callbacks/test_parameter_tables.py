"""Tables of numbers beside parameters: their start, their precision, and going on from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_lightning.callbacks.parameter_tables import ParameterTables
from lora_lightning.errors import ResumeError


def test_tables_start_at_zero_in_float32_at_least() -> None:
    params = {"a": nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16)), "b": nn.Parameter(torch.ones(4).double())}
    tables = ParameterTables(params, ("one", "two"))
    shards = tables.shards["one"]
    assert {name: (tuple(t.shape), t.dtype) for name, t in shards.items()} == {
        "a": ((3, 2), torch.float32),
        "b": ((4,), torch.float64),
    }
    assert not any(t.any() or t.requires_grad for table in tables.shards.values() for t in table.values())


def test_state_gives_the_same_tables_again_and_shares_nothing() -> None:
    params = {"a": nn.Parameter(torch.ones(3, 2))}
    tables = ParameterTables(params, ("one",))
    tables.shards["one"]["a"].add_(torch.arange(6.0).view(3, 2))
    state = tables.state()
    again = ParameterTables(params, ("one",), state)
    again.shards["one"]["a"].mul_(2)
    assert torch.equal(state["one"]["a"], torch.arange(6.0).view(3, 2))
    assert torch.equal(again.full(again.shards["one"])["a"], 2 * torch.arange(6.0).view(3, 2))


def test_a_checkpoint_without_a_parameter_is_refused() -> None:
    params = {"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.ones(3))}
    with pytest.raises(ResumeError, match=r'holds no table "one" for b'):
        ParameterTables(params, ("one",), {"one": {"a": torch.zeros(3)}})
    with pytest.raises(ResumeError, match=r'holds no table "one" for a'):
        ParameterTables(params, ("one",), {})
