"""The layer called with a formed weight: the output, exact gradients, and what is kept until backward."""

from __future__ import annotations

import pytest
import torch
from kept_memory import kept_bytes
from torch import nn

from lora_lightning.adapters.from_weight import forward_from_weight
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.testing.toy_models import LAYERS, seeded


def formed_by(gain, delta):
    return lambda weight: torch.tanh(gain * weight) + delta


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_autograd_without_recomputation(kind):
    make_layer, make_input = LAYERS[kind]
    with seeded(1):
        layer, x = make_layer().double().requires_grad_(requires_grad=False), make_input()
        base = core_base_layer(layer)
        delta = torch.randn(base.weight().shape, dtype=torch.float64)
    found = []
    for recompute in (True, False):
        leaves = [torch.tensor(0.7, dtype=torch.float64).requires_grad_(), delta.clone().requires_grad_()]
        own = x.double().requires_grad_() if x.is_floating_point() else x
        formed = formed_by(*leaves)
        y = forward_from_weight(base, own, formed) if recompute else base.apply(own, formed(base.weight()), base.bias)
        y.square().sum().backward()
        found.append([y, own.grad if own.requires_grad else y, *(leaf.grad for leaf in leaves)])
    for recomputed, direct in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, direct, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_the_output_is_allocated_until_backward(dtype):
    """Autograd alone would keep the formed weight, and in float32 what it is formed with."""
    with seeded(0):
        layer = nn.Linear(64, 48, dtype=dtype).requires_grad_(requires_grad=False)
        x, delta = torch.randn(7, 64, dtype=dtype), torch.zeros(48, 64, requires_grad=True)
    base, gain = core_base_layer(layer), torch.tensor(1.0, requires_grad=True)
    kept = kept_bytes(lambda x: forward_from_weight(base, x, formed_by(gain, delta)), x)
    direct = kept_bytes(lambda x: base.apply(x, formed_by(gain, delta)(base.weight(torch.float32)).to(dtype)), x)
    assert kept == 7 * 48 * layer.weight.element_size()
    assert direct > layer.weight.numel() * layer.weight.element_size()


def test_backward_forms_the_weight_once_and_computes_no_second_output():
    """Recomputation ends with the weight: the product of the forward is not repeated."""
    base, calls, products = core_base_layer(nn.Linear(6, 5)), [], []
    delta = torch.zeros(5, 6, requires_grad=True)
    base.module.register_forward_hook(lambda *_: products.append(1))
    y = forward_from_weight(base, torch.randn(3, 6), lambda weight: calls.append(1) or weight + delta)
    assert (len(calls), len(products)) == (1, 1)
    y.sum().backward()
    assert (len(calls), len(products)) == (2, 1)


def test_without_gradients_the_weight_is_formed_once():
    base, calls = core_base_layer(nn.Linear(6, 5)), []
    with torch.no_grad():
        x = torch.randn(3, 6)
        y = forward_from_weight(base, x, lambda weight: calls.append(1) or weight)
        assert torch.equal(y, base(x))
    assert len(calls) == 1
