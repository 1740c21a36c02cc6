"""Folded updates in a state dictionary."""

from __future__ import annotations

import pytest
import torch
from adapter_files import adapted

from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate
from lora_lightning.errors import ResumeError
from lora_lightning.storage.folded import folded_tensors, make_room_for_folded, rewrite_weights
from lora_lightning.storage.state import adapter_state


def test_tensors_are_found_by_layer_and_name() -> None:
    one, two = torch.ones(1), torch.ones(2)
    state = {"a.b.shifts.default.delta": one, "a.b.shifts.other.delta": two, "a.b.adapters.default.lora_A": two}
    assert folded_tensors(state, "default") == {"a.b": {"delta": one}}


@pytest.mark.parametrize("kind", [DenseUpdate, FactoredUpdate])
def test_room_is_made_so_that_a_state_can_be_loaded(kind: type) -> None:
    source, target = adapted(), adapted()
    layer = source.first
    layer.set_folded("default", kind(layer.base_layer))
    layer.fold("default")
    state = {key: tensor.clone() for key, tensor in adapter_state(source).items()}
    make_room_for_folded(target, "default", state)
    with torch.no_grad():
        for key, tensor in adapter_state(target).items():
            tensor.copy_(state[key])
    rewrite_weights(target)
    x = torch.linspace(-1, 1, 18).view(3, 6)
    assert torch.equal(target(x), source(x))
    assert type(target.first.shifts["default"]) is kind
    make_room_for_folded(target, "default", {})
    assert not target.first.shifts


def test_other_shapes_are_refused_by_layer() -> None:
    state = {"first.shifts.default.delta": torch.zeros(2, 2), "first.shifts.default.other": torch.zeros(1)}
    with pytest.raises(ResumeError, match="the checkpoint's adapter does not fit first"):
        make_room_for_folded(adapted(), "default", state)
