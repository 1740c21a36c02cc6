from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import Scaled, randomise
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.folded import DenseUpdate
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import AdapterStateError, ExportError
from lora_lightning.exporters.preview import refusals
from lora_lightning.methods import Method
from lora_lightning.testing import perturb, tiny_decoder


class ScaledOutput(Scaled):
    """y = g * (W x + b): the bias of the layer is scaled, without one there is none."""

    def forward(self, x: Tensor, base: BaseLayer) -> Tensor:
        return base(x) * self.gain

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias * self.gain.to(bias.dtype)


@dataclass(frozen=True, kw_only=True)
class OutputGain(Method):
    def build(self, base: BaseLayer) -> Adapter:
        return ScaledOutput(base)


def test_a_scaled_bias_is_in_the_dense_update_and_is_not_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3, bias=False))
    model = copy.deepcopy(plain)
    ll.inject(model, OutputGain(), ["0", "1"], also_train=())
    randomise(model)
    ll.export(model, tmp_path / "out", "delta")
    delta = load_file(tmp_path / "out" / "delta.safetensors")
    assert set(delta) == {"0.weight", "0.bias", "1.weight"}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter += delta[name]
    x = torch.randn(5, 6)
    torch.testing.assert_close(plain(x), model(x))
    layer = model[0]
    layer.set_folded("default", DenseUpdate(layer.base_layer))
    with pytest.raises(AdapterStateError, match="ScaledOutput changes the bias, which no folded update holds"):
        layer.fold("default")
    model[1].set_folded("default", DenseUpdate(model[1].base_layer))
    model[1].fold("default")


IDS = torch.tensor([[1, 5, 7, 2]])


def trained(untie: bool) -> Any:
    model = tiny_decoder(tied=True)
    ll.inject(model, ll.method("LoRA")(rank=2), ["lm_head", "q_proj"], untie=untie, seed=0)
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapters, size=0.1)
    return model


def added(delta: Mapping[str, Tensor], model: Any) -> Tensor:
    with torch.no_grad():
        for name, change in delta.items():
            model.get_parameter(name).add_(change)
        return model(IDS).logits


def test_the_update_of_an_untied_model_says_which_weight_is_one_of_its_own(tmp_path: Path) -> None:
    model = trained(untie=True)
    expected = model(IDS).logits
    report = ll.export(model, tmp_path / "out", "delta")
    assert any("lm_head.weight is a weight of its own" in note for note in report.notes)
    with safe_open(tmp_path / "out" / "delta.safetensors", "pt") as file:
        assert file.metadata()["untied"] == "lm_head.weight"
    delta = load_file(tmp_path / "out" / "delta.safetensors")
    apart = tiny_decoder(tied=True)
    apart.lm_head.weight = nn.Parameter(apart.lm_head.weight.detach().clone())
    torch.testing.assert_close(added(delta, apart), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(added(delta, tiny_decoder(tied=True)), expected, atol=1e-3)


def test_the_update_of_a_tied_weight_is_refused_with_two_ways_out(tmp_path: Path) -> None:
    model = trained(untie=False)
    message = r'lm_head shares its weight with .*Use format="peft", .* or train with untie=True'
    with pytest.raises(ExportError, match=message):
        ll.export(model, tmp_path / "delta", "delta")
    assert "shares its weight" in refusals(model)["delta"]
    ll.export(model, tmp_path / "peft")
    ll.export(trained(untie=True), tmp_path / "delta", "delta")
