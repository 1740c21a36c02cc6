from __future__ import annotations

import copy

import pytest
import torch
from adapted_models import METHOD, adapted
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import AdapterStateError
from lora_lightning.injection.records import injected_root, records


def test_adapters_of_a_part_are_refused_and_found_from_outside() -> None:
    whole = nn.ModuleDict({"net": adapted()})
    assert injected_root(whole) is whole["net"]
    with pytest.raises(AdapterStateError, match=r"net \(TinyMLP\) has adapters of its own; inject into that module"):
        ll.inject(whole, METHOD, name="b")
    assert [path for path, _ in ll.iter_adapters(whole)] == ["net.first", "net.second"]
    with pytest.raises(AdapterStateError, match="Linear has no adapters; call inject or load_adapter first"):
        injected_root(nn.Linear(1, 1))


def test_a_copy_is_a_model_of_its_own() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    ll.eject(twin)
    assert list(records(model)) == ["default"]
    assert list(ll.iter_adapters(model))


def test_functions_find_the_adapters_inside_wrappers() -> None:
    model = adapted()
    wrapped = torch.compile(model, backend="eager")
    ll.set_active(wrapped, [])
    assert model.first.active == ()
    ll.set_active(wrapped, "default")
    ll.merge(wrapped)
    assert model.first.merged == ("default",)
