"""Base layers: who serves a module, what quantized ones refuse, and what is counted."""

from __future__ import annotations

import pytest
import torch
from quantized_layers import Steps, StepsBase
from torch import nn

from lora_lightning.adapters.layers.kinds import LinearBase
from lora_lightning.errors import PluginError, TargetError
from lora_lightning.models import base_layers
from lora_lightning.models.base_layers import base_layer_of, check_quantized, count_numbers, kind_of


def test_core_serves_what_no_plugin_does() -> None:
    assert isinstance(base_layer_of(nn.Linear(2, 3)), LinearBase)
    assert base_layer_of(nn.ReLU()) is None


def test_a_plugin_is_asked_first_and_two_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 3)
    mine = LinearBase(layer)
    monkeypatch.setattr(base_layers, "base_layer_kinds", lambda _: [("ll_one", lambda module: mine)])
    assert base_layer_of(layer) is mine
    kinds = [("ll_one", lambda module: mine), ("ll_other", lambda module: mine)]
    monkeypatch.setattr(base_layers, "base_layer_kinds", lambda _: kinds)
    with pytest.raises(PluginError, match="Linear is served by ll_one and ll_other; leave one out with -p no:ll_one"):
        base_layer_of(layer)
    monkeypatch.setattr(base_layers, "base_layer_kinds", lambda _: [("ll_one", lambda module: 7)])
    with pytest.raises(PluginError, match="ll_one: lora_lightning_base_layers made 7 of a Linear"):
        base_layer_of(layer)


def test_a_quantized_weight_cannot_train_and_one_without_backward_needs_an_adapter() -> None:
    base, blind = StepsBase(nn.Linear(4, 3)), StepsBase(nn.Linear(4, 3), differentiable=False)
    check_quantized({"a": base}, ["a.bias"], [])
    check_quantized({"b": blind}, [], ["b"])
    with pytest.raises(TargetError, match=r"a\.weight is stored as steps, so it cannot train in full"):
        check_quantized({"a": base}, ["a.weight"], [])
    with pytest.raises(TargetError, match="b is stored as steps, whose product has no backward, and gets no adapter"):
        check_quantized({"a": base, "b": blind}, [], ["a"])


def test_numbers_of_a_quantized_weight_are_those_it_stands_for() -> None:
    base = StepsBase(nn.Linear(4, 3))
    half = nn.Parameter(torch.zeros(6, dtype=torch.uint8), requires_grad=False)  # two numbers a byte
    parameters = {"a.weight": half, "a.bias": base.module.bias, "b.base.weight": half, "c": nn.Parameter(torch.ones(5))}
    assert count_numbers(parameters, {"a": base, "b": base}) == 12 + 3 + 12 + 5
    assert count_numbers(parameters, {}) == 6 + 3 + 6 + 5


def test_the_kind_names_the_format() -> None:
    assert kind_of(LinearBase(nn.Linear(2, 3))) == "linear"
    assert kind_of(StepsBase(nn.Linear(2, 3))) == "linear, steps"
    assert isinstance(StepsBase(nn.Linear(2, 3)).module, Steps)
