"""Layers of bitsandbytes and torchao as base layers, against their packages' own dequantized weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_lightning as ll
from lora_lightning import plugins
from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate
from lora_lightning.adapters.layers.quantized import QuantizedBase
from lora_lightning.adapters.noise import Noise
from lora_lightning.errors import AdapterFileError, AdapterStateError, TargetError
from lora_lightning.models.anatomy import survey
from lora_lightning.models.base_layers import base_layer_of
from lora_lightning.storage.fingerprint import fingerprint
from lora_lightning.testing import TinyMLP, perturb
from lora_lightning.testing.toy_models import QUANTIZED, seeded

LoRA, DoRA = plugins.method("LoRA"), plugins.method("DoRA")


def quantized(kind, dtype=torch.float32, d_in=16, d_out=8):
    package, quantize = QUANTIZED[kind]
    pytest.importorskip(package, reason=f'needs {package}: pip install "lora-lightning[quant]"')
    with seeded(1):
        return quantize(nn.Linear(d_in, d_out).to(dtype))


def by_the_package(kind, layer):
    """The dequantized weight in float64, without this library."""
    if kind.startswith("nf4"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    if kind == "int8":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scale = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        numbers = layer.state.CB if layer.state.CB is not None else layer.weight.data
        return int8_vectorwise_dequant(numbers, scale).double()
    return layer.weight.dequantize().double()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_weight_is_the_packages(kind):
    layer = quantized(kind)
    base = base_layer_of(layer)
    assert isinstance(base, QuantizedBase)
    assert (base.format, base.kind, base.d_in, base.d_out) == (kind, "linear", 16, 8)
    for _ in range(2):  # before and after a forward, which may move the numbers
        torch.testing.assert_close(base.weight(torch.float64), by_the_package(kind, layer), rtol=1e-7, atol=1e-9)
        layer.train()(torch.randn(2, 16))
    with seeded(1):
        plain = nn.Linear(16, 8).weight
    coarse = {"nf4": 0.2, "nf4-double": 0.2, "torchao-int4": 0.2}.get(kind, 0.01)
    assert float((base.weight() - plain.detach()).norm() / plain.detach().norm()) < coarse


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_dtype(kind, dtype):
    """What a weight was quantized from, or, where no one has kept that, what the model's other weights are."""
    model = nn.Sequential(nn.LayerNorm(16, dtype=dtype), quantized(kind, dtype))
    ll.inject(model, LoRA(rank=2), ["1"], also_train=(), seed=0)
    assert model[1].base_layer.dtype == dtype
    perturb(model[1].adapter("default"))
    x = torch.randn(3, 16, dtype=dtype)
    before = model(x)
    ll.merge(model)
    assert model[1].base.weight.dtype == dtype
    torch.testing.assert_close(model(x), before, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=4.0), DoRA(rank=2, alpha=4.0)], ids=lambda m: type(m).__name__)
def test_a_layer_by_hand(kind, method):
    """y = x W'^T + b in float64, W' from the paper's equation and the package's weight."""
    layer = quantized(kind).train()
    model = nn.Sequential(layer)
    ll.inject(model, method, ["0"], also_train=(), seed=0)
    adapter = model[0].adapter("default")
    perturb(adapter)
    W = by_the_package(kind, layer)
    V = W + 2.0 * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
    if isinstance(method, DoRA):
        V = adapter.magnitude.detach().double()[:, None] * V / V.norm(dim=1, keepdim=True)
    x, G = torch.randn(5, 16, requires_grad=True), torch.randn(5, 8)
    model(x).backward(G)
    y = x.detach().double() @ V.mT + layer.bias.double()
    assert float((model(x).detach() - y).norm() / y.norm()) < (3e-3 if kind == "int8" else 1e-6)
    dx = G.double() @ V
    assert float((x.grad - dx).norm() / dx.norm()) < (3e-3 if kind == "int8" else 1e-6)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_merging_prints_is_measured(kind, capsys):
    model = nn.Sequential(quantized(kind))
    ll.inject(model, LoRA(rank=2), ["0"], also_train=(), seed=0)
    perturb(model[0].adapter("default"))
    twin = copy.deepcopy(model.eval())
    ll.merge(model)
    text = capsys.readouterr().out
    assert f"1 layers ({kind}) in float32" in text
    stated = float(text.split("differ from the unmerged ones by ")[1].split(" at most")[0])
    x = torch.randn(2000, 16)
    found = float((model(x) - twin(x)).detach().abs().max())
    assert found / 10 < stated + 1e-8
    assert stated < 10 * found + 1e-6


# the other kind takes inputs of its own dtype alone
@pytest.mark.parametrize("kind", [kind for kind in QUANTIZED if kind != "torchao-int4"])
def test_a_merged_copy_takes_inputs_of_any_dtype_as_the_packed_layer_does(kind):
    model = nn.Sequential(quantized(kind))
    ll.inject(model, LoRA(rank=2), ["0"], also_train=(), seed=0)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        before = model(x)
        ll.merge(model)
        after = model(x)
    assert before.dtype == after.dtype == torch.bfloat16
    torch.testing.assert_close(after, before, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_has_factors_folds_and_the_rest_is_refused(kind):
    model = nn.Sequential(quantized(kind))
    ll.inject(model, LoRA(rank=2), ["0"], also_train=(), seed=0)
    layer, x = model[0].train(), torch.randn(4, 16)
    perturb(layer.adapter("default"))
    before = model(x)
    layer.set_folded("default", FactoredUpdate(layer.base_layer))
    layer.fold("default")
    layer.adapter("default").reset(torch.Generator().manual_seed(3))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterStateError, match=f"stored as {kind}, and an update that has no factors would have"):
        layer.set_folded("default", DenseUpdate(layer.base_layer))
    with pytest.raises(AdapterStateError, match=f"stored as {kind}, and noise would have to be written into it"):
        layer.set_noise(Noise(0, 0, "0", 0.1))
    with pytest.raises(AdapterStateError, match=f"stored as {kind}, which cannot be written"):
        layer.base_layer.write(torch.zeros(8, 16))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_would_train_in_few_bits_is_refused(kind):
    model = TinyMLP()
    model.first, model.second = quantized(kind, d_in=8, d_out=8), quantized(kind, d_in=8, d_out=8)
    with pytest.raises(TargetError, match=f"second.weight is stored as {kind}, so it cannot train in full"):
        ll.inject(model, LoRA(rank=2), ["first"], also_train=["second"])
    assert not list(ll.iter_adapters(model))
    report = ll.inject(model, LoRA(rank=2), ["first"], also_train=())
    assert report.layers == {"first": (f"linear, {kind}", 8, 8)}
    assert report.total_parameters == 2 * (64 + 8) + report.adapter_parameters


@pytest.mark.parametrize(
    ("kind", "held"),  # 64 x 32 weights, and scales: of blocks of 64 (doubled: and an offset), of rows, of groups of 8
    [
        ("nf4", 1024 + 32 * 4),
        ("nf4-double", 1024 + 32 + 4 + 4),
        ("int8", 2048 + 32 * 4),
        ("torchao-int8", 2048 + 32 * (4 + 1)),
        ("torchao-int4", 2048 + 256 * (4 + 1)),
    ],
)
def test_bytes_that_frozen_weights_hold(kind, held):
    model = nn.Sequential(quantized(kind, d_in=64, d_out=32), nn.LayerNorm(32).requires_grad_(False))
    ll.inject(model, LoRA(rank=2), ["0"], also_train=())
    assert survey(model).frozen_bytes == held + (32 + 2 * 32) * 4


def test_a_format_without_backward_must_be_adapted(monkeypatch):
    model = nn.Sequential(quantized("torchao-int8"), quantized("torchao-int8", d_in=8))
    monkeypatch.setattr("ll_quantized.torch_ao._HAS_NO_BACKWARD", ("Int8",))
    with pytest.raises(TargetError, match="0 is stored as torchao-int8, whose product has no backward, and gets no"):
        ll.inject(model, LoRA(rank=2), ["1"], also_train=())
    ll.inject(model, LoRA(rank=2), ["0", "1"], also_train=())


@pytest.mark.parametrize("kind", QUANTIZED)
def test_fingerprint_has_plain_names_and_shapes(kind):
    """An adapter of a quantized base fits the plain model, and the other way round."""
    with seeded(1):
        plain = nn.Sequential(nn.Linear(16, 8))
    few_bits = nn.Sequential(quantized(kind))
    assert survey(few_bits).formats == kind
    one, other = fingerprint(survey(plain)), fingerprint(survey(few_bits))
    assert one["names"] == other["names"]
    assert other["weights"] is None
    ll.inject(few_bits, LoRA(rank=2), ["0"], also_train=())
    ll.merge(few_bits)
    assert fingerprint(survey(few_bits)) == other


@pytest.mark.parametrize("kind", QUANTIZED)
def test_an_adapter_goes_to_the_plain_model_and_says_what_was_not_compared(kind, tmp_path, capsys):
    few_bits = nn.Sequential(quantized(kind))
    ll.inject(few_bits, LoRA(rank=2), ["0"], also_train=())
    perturb(few_bits[0].adapter("default"))
    ll.save_adapter(few_bits, tmp_path / "adapter")
    with seeded(1):
        plain = nn.Sequential(nn.Linear(16, 8))
    ll.load_adapter(plain, tmp_path / "adapter")
    said = f"base weights were compared by name and shape only; they are stored plain here and as {kind} in training"
    assert said in capsys.readouterr().out
    own, theirs = (model[0].adapter("default").state_dict() for model in (plain, few_bits))
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)


def test_a_float_layer_of_bitsandbytes_is_none_of_these():
    bnb = pytest.importorskip("bitsandbytes", reason='needs bitsandbytes: pip install "lora-lightning[quant]"')
    layer = bnb.nn.Linear8bitLt(16, 8, has_fp16_weights=True)
    assert not isinstance(base_layer_of(layer), QuantizedBase)
    assert not isinstance(base_layer_of(bnb.nn.Linear4bit(16, 8)), QuantizedBase)
    assert not isinstance(base_layer_of(bnb.nn.Embedding(4, 8)), QuantizedBase)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_changed_quantized_weight_is_noticed_on_load(kind, tmp_path, capsys):
    """In the numbers, or in their scales; the same weight in the same format is loaded without a word."""

    def base():
        return nn.Sequential(quantized(kind))

    model = base()
    ll.inject(model, LoRA(rank=2), ["0"], also_train=())
    ll.save_adapter(model, tmp_path)
    fresh = base()
    ll.load_adapter(fresh, tmp_path)
    assert "compared" not in capsys.readouterr().out
    for number in range(len(survey(base()).quantized["0"].parts)):
        other = base()
        part = survey(other).quantized["0"].parts[number].view(-1)
        with torch.no_grad():
            part[-1:] = part[-1:] + 1
        with pytest.raises(AdapterFileError, match="was trained on other base weights than this model has"):
            ll.load_adapter(other, tmp_path)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_another_version_had_quantized_is_compared_by_names_and_that_is_said(kind, tmp_path, capsys, monkeypatch):
    model, fresh = nn.Sequential(quantized(kind)), nn.Sequential(quantized(kind))
    ll.inject(model, LoRA(rank=2), ["0"], also_train=())
    ll.save_adapter(model, tmp_path)
    monkeypatch.setattr("lora_lightning.storage.fingerprint.version", lambda _: "0.0")
    ll.load_adapter(fresh, tmp_path)
    said = capsys.readouterr().out
    assert "base weights were compared by name and shape only; they are stored as " in said
    assert f"{kind} of " in said
    assert " 0.0 on cpu" in said
