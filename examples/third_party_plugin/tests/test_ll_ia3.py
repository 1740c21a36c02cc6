"""(IA)^3: the contract, and the equations against a dense reference in float64."""

from __future__ import annotations

import pytest
import torch
from ll_ia3 import IA3
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import SettingsError
from lora_lightning.injection.records import adapters_named
from lora_lightning.testing import MethodContract, perturb


class TestOutputScales(MethodContract):
    method = IA3()
    random_start = False


class TestInputScales(MethodContract):
    method = IA3(side="input")
    base_kinds = ("Linear", "Linear without bias", "Conv1D")
    random_start = False


@pytest.mark.parametrize("side", ["output", "input"])
def test_output_and_gradient_are_those_of_the_equations(side):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4).double(), torch.randn(3, 6, dtype=torch.float64)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    model = nn.Sequential(layer)
    ll.inject(model, IA3(side=side), ["0"], also_train=())
    adapter = adapters_named(model, "default")["0"]
    perturb(adapter)
    scale = adapter.scale.detach().clone().requires_grad_()
    diagonal = torch.diag(scale)
    expected = (x @ W.T + b) @ diagonal if side == "output" else x @ diagonal @ W.T + b
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    model(x).square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(adapter.scale.grad, scale.grad, rtol=1e-10, atol=1e-12)


def test_input_scales_need_a_linear_layer():
    with pytest.raises(SettingsError, match=r'IA3\.side is "input"; on a layer of kind "conv" it must be "output"'):
        ll.inject(nn.Sequential(nn.Conv1d(3, 4, 3)), IA3(side="input"), ["0"], also_train=())


def test_decay_leaves_scales_alone():
    model = nn.Sequential(nn.Linear(6, 4))
    ll.inject(model, IA3(), ["0"], also_train=())
    groups = IA3().param_groups(adapters_named(model, "default"))
    assert [spec.weight_decay for spec in groups.values()] == [0.0]
