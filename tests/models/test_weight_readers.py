from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapted_models import METHOD
from architectures import ARCHITECTURES
from torch import Tensor, nn

import lora_lightning as ll
from ll_dora import DoRA
from ll_lora import LoRA
from ll_riemannian_moe import MoELoRA
from lora_lightning.errors import AdapterStateError, TargetError
from lora_lightning.injection.records import adapters_named
from lora_lightning.models.anatomy import survey
from lora_lightning.testing import perturb
from lora_lightning.testing.toy_models import seeded

ROUTED = MoELoRA(experts=3, top_k=2, rank=1)


class Owner(nn.Module):
    """Calls one layer, reads two, and asks two for their dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.both, self.asked = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.called.weight.dtype)) @ self.read.weight.T
        x = nn.functional.linear(x, self.both.weight) if self.training else self.both(x)
        return self.asked(x.to(self.asked.weight.dtype))


class Heir(Owner):
    """Inherits what it reads."""


def test_what_an_owner_only_reads() -> None:
    for owner in (Owner, Heir):
        assert survey(owner()).weight_read(["called", "read", "both", "asked"]) == {"read": owner.__name__}


def test_owners_of_transformers() -> None:
    mamba, attention = ARCHITECTURES["Mamba"].build(), nn.MultiheadAttention(4, 2)
    layers = [path for path, module in mamba.named_modules() if isinstance(module, nn.Linear)]
    mixers = [f"backbone.layers.{index}.mixer.dt_proj" for index in (0, 1)]
    assert survey(mamba).weight_read(layers) == dict.fromkeys(mixers, "MambaMixer")
    jamba = ARCHITECTURES["Jamba"].build()  # calls it where the model is quantized
    layers = [path for path, module in jamba.named_modules() if isinstance(module, nn.Linear)]
    assert survey(jamba).weight_read(layers) == {"model.layers.0.mamba.dt_proj": "JambaMambaMixer"}
    assert survey(attention).weight_read(["out_proj"]) == {"out_proj": "MultiheadAttention"}
    t5 = ARCHITECTURES["T5"].build()
    assert survey(t5).weight_read([path for path, module in t5.named_modules() if isinstance(module, nn.Linear)]) == {}


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2)])
def test_a_layer_that_is_read_computes_its_adapter(method: object) -> None:
    """Against the layer's equation, with the adapter's own product."""
    torch.manual_seed(0)
    owner, x = Owner().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    report = ll.inject(owner, method, ["read"])
    assert "1 layer, such as read, are read by Owner instead of called" in " ".join(report.notes)
    perturb(owner.read.adapters)
    weight = owner.read.adapters["default"].merged_weight(owner.read.base.weight)
    torch.testing.assert_close(owner(x), owner.asked(owner.both(owner.called(x) @ weight.T)))
    owner(x).sum().backward()
    assert all(p.grad.any() for p in owner.read.adapters.parameters())


def test_a_routed_adapter_on_a_layer_that_is_read_is_refused() -> None:
    mamba = ARCHITECTURES["Mamba"].build()
    message = (
        r"backbone.layers.0.mixer.dt_proj is read by MambaMixer instead of called, .*"
        r'MoELoRA has none, since it depends on the input. exclude=\["dt_proj"\]'
    )
    with pytest.raises(TargetError, match=message):
        ll.inject(mamba, ROUTED)
    ll.inject(mamba, ROUTED, exclude=["dt_proj"])
    mamba(**ARCHITECTURES["Mamba"].batch()).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in mamba.parameters())


def test_a_routed_adapter_answers_what_its_weight_is_like() -> None:
    """T5 asks `wo` for its dtype before it calls it."""
    t5 = ARCHITECTURES["T5"].build()
    with torch.no_grad():
        base = t5(**ARCHITECTURES["T5"].batch()).logits
        ll.inject(t5, ROUTED)
        assert torch.equal(t5(**ARCHITECTURES["T5"].batch()).logits, base)
    layer = t5.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(layer.weight, Tensor)
    assert (layer.weight.dtype, layer.weight.device) == (torch.float32, torch.device("cpu"))
    assert (layer.weight.shape, layer.weight.size(0), layer.weight.dim()) == ((16, 24), 16, 2)
    with pytest.raises(AdapterStateError, match='adapter "default" depends on its input, so no single weight states'):
        torch.ones(1, 24) @ layer.weight.T
    with pytest.raises(AdapterStateError, match="no single weight"):
        layer.weight.to(torch.float64)


def transformer(seed: int = 0) -> nn.TransformerEncoder:
    with seeded(seed):
        block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(block, 2, enable_nested_tensor=False).eval()


def test_attention_of_torch_is_adapted_through_the_weight_it_reads() -> None:
    """nn.MultiheadAttention reads out_proj.weight; its fast path, taken in eval without gradients, all weights."""
    model, x = transformer(), torch.randn(2, 5, 16)
    report = ll.inject(model, METHOD, seed=0)
    assert set(report.skipped) == {f"layers.{i}.self_attn.in_proj_weight" for i in (0, 1)}
    assert any("layers.0.self_attn.out_proj, are read by MultiheadAttention" in note for note in report.notes)
    for i, adapter in enumerate(adapters_named(model, "default").values()):
        perturb(adapter, i)
    merged = copy.deepcopy(model)
    ll.merge(merged)
    base = transformer()(x)
    for training in (False, True):
        for grad in (False, True):
            model.train(training)
            merged.train(training)
            with torch.set_grad_enabled(grad):
                y = model(x)
                torch.testing.assert_close(y, merged(x), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(y, base, atol=1e-2)
    with ll.disable_adapters(model.eval()), torch.no_grad():
        torch.testing.assert_close(model(x), base)
    model.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_the_fast_path_of_torch_is_really_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would compare the slow path only."""
    model, x, calls = transformer(), torch.randn(2, 5, 16), 0
    fast = torch._transformer_encoder_layer_fwd

    def counted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return fast(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    ll.inject(model, METHOD)
    with torch.no_grad():
        model(x)
    assert calls == 2
    model(x)
    assert calls == 2
