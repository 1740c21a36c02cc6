"""State dictionaries hold the original weight, whatever the layer holds when they are made or loaded."""

from __future__ import annotations

import pytest
import torch
from one_layer import adapted

from ll_lora import LoRA
from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate
from lora_lightning.adapters.noise import Noise
from lora_lightning.errors import AdapterStateError


def state_of(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in layer.state_dict().items()}


@pytest.mark.parametrize("kind", ["Linear", "Linear without bias", "Conv1D", "Embedding", "Experts transposed"])
@pytest.mark.parametrize("change", ["merge", "noise"])
def test_a_state_is_that_of_the_original(kind: str, change: str) -> None:
    bias = kind.startswith("Linear")
    layer = adapted(kind, method=LoRA(rank=2, bias=bias))
    before = state_of(layer)
    layer.merge() if change == "merge" else layer.set_noise(Noise(0, 0, "0", 0.5))
    assert not torch.equal(layer.base.weight, before["base.weight"])
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("form", [FactoredUpdate, DenseUpdate])
def test_a_state_brings_what_was_folded(form: type) -> None:
    layer, fresh, x = adapted(dtype=torch.float64), adapted(dtype=torch.float64), torch.randn(3, 6).double()
    layer.set_folded("default", form(layer.base_layer))
    layer.fold("default", 0.5)
    fresh.load_state_dict(layer.state_dict())
    assert type(fresh.folded("default")) is form
    assert torch.equal(fresh(x), layer(x))
    assert fresh.rewritten == (form is DenseUpdate)
    plain = adapted(dtype=torch.float64)
    fresh.load_state_dict(plain.state_dict())
    assert fresh.folded("default") is None
    assert torch.equal(fresh(x), plain(x))


def test_a_state_of_another_shape_is_refused() -> None:
    layer, other = adapted(), adapted("Embedding")
    other.set_folded("default", DenseUpdate(other.base_layer))
    folded = {key: value for key, value in other.state_dict().items() if key.startswith(("shifts", "adapters"))}
    with pytest.raises(AdapterStateError, match='adapter "default": what was folded has other shapes than this layer'):
        layer.load_state_dict(folded, strict=False)


def test_a_merged_layer_takes_no_state() -> None:
    layer = adapted()
    state = state_of(layer)
    layer.merge()
    with pytest.raises(AdapterStateError, match="default is merged; call unmerge first"):
        layer.load_state_dict(state)
