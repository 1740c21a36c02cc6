from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from exported_models import Scaled, randomise
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.folded import DenseUpdate
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import AdapterStateError
from lora_lightning.methods import Method


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
