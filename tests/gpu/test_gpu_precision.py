"""Half precision on a CUDA device: starts that are exact, adapters that stay float32, outputs of the base's dtype."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from on_gpu import DEVICE, METHODS, MODELS, adapted, tokens
from torch import nn

from lora_lightning.errors import SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named
from lora_lightning.injection.switches import disable_adapters
from lora_lightning.testing.toy_models import LAYERS, seeded

pytestmark = pytest.mark.gpu

MODES = {
    "float32": (torch.float32, None),
    "float32 under bfloat16 autocast": (torch.float32, torch.bfloat16),
    "float32 under float16 autocast": (torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16 under autocast": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, None),
}
"""The base's dtype, and what autocast casts to."""


def context(cast):
    return nullcontext() if cast is None else torch.autocast(DEVICE, cast)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_a_model_starts_at_its_base(name, model, mode):
    """Bit for bit, in training mode too, and the gradients of the first backward are finite float32."""
    dtype, cast = MODES[mode]
    net, ids = adapted(model, METHODS[name], moved=False, dtype=dtype), tokens()
    with torch.no_grad(), context(cast):
        plain = MODELS[model]().to(DEVICE, dtype)(ids).logits
        assert torch.equal(net(ids).logits, plain)
        with disable_adapters(net):
            assert torch.equal(net(ids).logits, plain)
    trained = [p for adapter in adapters_named(net, "default").values() for p in adapter.parameters()]
    assert {p.dtype for p in trained} == {torch.float32}
    with context(cast):
        logits = net.train()(ids).logits
    assert logits.dtype == plain.dtype
    logits.float().square().mean().backward()
    grads = [p.grad for p in trained if p.grad is not None]
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert any(bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_layer_starts_at_its_base(name, mode):
    dtype, cast = MODES[mode]
    taken = []
    for kind, (make_layer, make_input) in LAYERS.items():
        with seeded(1):
            model, x = nn.Sequential(make_layer()).to(DEVICE, dtype), make_input().to(DEVICE)
        x = x.to(dtype) if x.is_floating_point() else x
        try:
            inject(model, METHODS[name], ["0"], also_train=(), seed=0)
        except SettingsError:
            continue  # a kind that the method refuses by name
        taken.append(kind)
        with torch.no_grad(), context(cast):
            adapted_output, base_output = model(x), model[0].base(x)
        assert adapted_output.dtype == base_output.dtype, kind
        assert torch.equal(adapted_output, base_output), kind
    assert {"Linear", "Linear without bias", "Conv1D"} <= set(taken)
