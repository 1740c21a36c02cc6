"""Merging quantized layers: a plain one takes their place, and what that changes is measured."""

from __future__ import annotations

import torch
from quantized_layers import Steps, StepsBase
from torch import nn

import lora_lightning as ll
from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.injection.merge_quantized import INPUTS, Dequantized
from lora_lightning.seeds import generator
from lora_lightning.testing import perturb
from lora_lightning.testing.toy_models import seeded

LoRA = ll.method("LoRA")


def adapted(base: StepsBase) -> AdaptedLayer:
    layer = AdaptedLayer(base)
    adapter = LoRA(rank=2, dropout=0.5).build(base)
    perturb(adapter)
    layer.add("default", adapter)
    return layer.train()


def test_the_reported_difference_is_that_of_outputs_in_evaluation() -> None:
    with seeded(0):
        layer = adapted(StepsBase(nn.Linear(6, 4)))
    draws = torch.randn(INPUTS, 6, generator=generator(0, "merge", 0, "a.b"))
    layer.eval()
    before = layer(draws)
    layer.train()
    found = Dequantized()
    found.merge("a.b", layer)
    assert layer.training
    assert isinstance(layer.base, nn.Linear)
    layer.eval()
    difference = (layer(draws) - before).detach().double()
    assert found.largest == float(difference.abs().max())
    assert found.relative == float(difference.norm() / before.detach().double().norm())
    assert (found.layers, found.formats, found.dtypes, found.worst) == (1, {"steps"}, {"float32"}, "a.b")
    assert "merged into dequantized copies: 1 layers (steps) in float32" in str(found)
    layer.unmerge()
    assert isinstance(layer.base, Steps)
    assert torch.equal(layer(draws), before)


def test_plain_and_inactive_layers_are_not_measured() -> None:
    found = Dequantized()
    model = nn.Sequential(nn.Linear(6, 4))
    ll.inject(model, LoRA(rank=2), seed=0)
    found.merge("0", model.get_submodule("0"))  # type: ignore[arg-type]
    inactive = adapted(StepsBase(nn.Linear(6, 4)))
    inactive.active = ()
    found.merge("1", inactive)
    assert found.layers == 0
    assert isinstance(inactive.base, Steps)
