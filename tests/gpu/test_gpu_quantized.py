"""Bases quantized on a CUDA device: starts, outputs by hand, gradients, merging, and what the weights hold."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from on_gpu import DEVICE, METHODS
from torch import nn

import lora_lightning as ll
from lora_lightning.injection.records import adapters_named
from lora_lightning.models.anatomy import survey
from lora_lightning.models.base_layers import base_layer_of
from lora_lightning.testing import perturb
from lora_lightning.testing.toy_models import seeded

pytestmark = pytest.mark.gpu

D_IN, D_OUT = 1024, 512  # sides that every kernel takes
FORMATS = {
    "nf4": "bitsandbytes",
    "nf4-double": "bitsandbytes",
    "int8": "bitsandbytes",
    "torchao-int8": "torchao",
    "torchao-int4": "torchao",
}
INPUTS_ROUNDED = 3e-2
"""|difference| / |output| where a product rounds its inputs to eight bits or to bfloat16."""


def plain(dtype=torch.bfloat16):
    with seeded(1):
        return nn.Linear(D_IN, D_OUT).to(dtype)


def quantized(name, dtype=torch.bfloat16):
    """A packed layer on the device, made by its package alone."""
    package = FORMATS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f'needs {package}: pip install "lora-lightning[quant]"')
    layer = plain(dtype)
    if package == "torchao":
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        model = nn.Sequential(layer.to(DEVICE))
        packed = {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"}
        quantize_(model, Int8WeightOnlyConfig() if name == "torchao-int8" else Int4WeightOnlyConfig(**packed))
        return model[0].requires_grad_(False)
    import bitsandbytes as bnb

    if name == "int8":
        made = bnb.nn.Linear8bitLt(D_IN, D_OUT, has_fp16_weights=False, threshold=6.0)
    else:
        made = bnb.nn.Linear4bit(
            D_IN, D_OUT, compute_dtype=dtype, compress_statistics=name == "nf4-double", quant_type="nf4"
        )
    made.load_state_dict(layer.state_dict())
    made.bias = nn.Parameter(layer.bias.detach().clone())
    return made.to(DEVICE).requires_grad_(False)


def adapted(name, method, moved=True):
    model = nn.Sequential(quantized(name), nn.LayerNorm(D_OUT, dtype=torch.bfloat16)).to(DEVICE).eval()
    ll.inject(model, method, ["0"], also_train=(), seed=0)
    if moved:
        for adapter in adapters_named(model, "default").values():
            perturb(adapter, size=0.02)
    return model


def inputs(n=64):
    with seeded(2):
        return torch.randn(n, D_IN).to(DEVICE, torch.bfloat16)


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_start_gradients_and_dtypes(name, method):
    model, x = adapted(name, METHODS[method], moved=False), inputs()
    layer = model[0]
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base(x))
    for adapter in adapters_named(model, "default").values():
        perturb(adapter, size=0.02)
    x.requires_grad_()
    y = model.train()(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert bool(x.grad.any())
    assert {p.dtype for p in layer.adapter("default").parameters()} == {torch.float32}
    assert all(p.grad is None for p in layer.base.parameters())


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_and_gradients_by_hand(name):
    """In float64, with the weight as the layer itself multiplies the unit matrix by it."""
    layer = quantized(name)
    with torch.no_grad():
        unit = torch.eye(D_IN, device=DEVICE, dtype=torch.bfloat16)
        W = (layer(unit).double() - layer.bias.double()).mT
    base = base_layer_of(layer)
    assert base.format == name
    assert relative(base.weight(torch.float64), W) < 2e-2
    model = adapted(name, METHODS["LoRA"])
    adapter, x = model[0].adapter("default"), inputs().requires_grad_()
    V = base.weight(torch.float64)
    V = V + adapter.scaling * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
    y, G = model[0](x), torch.ones(64, D_OUT, device=DEVICE, dtype=torch.bfloat16)
    y.backward(G)
    assert relative(y, x.detach().double() @ V.mT + layer.bias.double()) < INPUTS_ROUNDED
    assert relative(x.grad, G.double() @ V) < INPUTS_ROUNDED


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_merging(name, method, capsys):
    model, x = adapted(name, METHODS[method]), inputs()
    packed = model[0].base
    with torch.no_grad():
        before = model(x)
        ll.merge(model)
        print(capsys.readouterr().out)
        assert type(model[0].base) is nn.Linear
        assert model[0].base.weight.device.type == DEVICE
        assert relative(model(x), before) < INPUTS_ROUNDED
        ll.unmerge(model)
        assert model[0].base is packed
        assert torch.equal(model(x), before)


def test_bytes_on_the_device():
    """What the frozen weights hold is what the allocator gives out for them, up to its blocks."""
    torch.cuda.empty_cache()
    quantized("nf4")
    before = torch.cuda.memory_allocated()
    model = nn.Sequential(*[quantized("nf4") for _ in range(8)])
    held = survey(model).frozen_bytes
    allocated = torch.cuda.memory_allocated() - before
    assert held <= allocated <= 1.1 * held + 8 * 4096
    assert held < 8 * D_IN * D_OUT * 0.6 + 8 * D_OUT * 4
