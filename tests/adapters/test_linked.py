"""Linked modules: registered once, referred to from adapters, full precision like what trains."""

from __future__ import annotations

import torch
from miniatures.sharing import SharedFactors, TiedLoRA
from torch import nn

from lora_lightning import inject
from lora_lightning.adapters.base import linked_modules, pair_groups, trains
from lora_lightning.adapters.linked import LinkedAdapters
from lora_lightning.injection.inject import lower_adapters
from lora_lightning.injection.records import adapters_named, linked_named
from lora_lightning.injection.switches import set_trainable
from lora_lightning.testing import TinyMLP


def tied() -> TinyMLP:
    model = TinyMLP()
    inject(model, TiedLoRA(), ["first", "second"], also_train=())
    return model


def test_half_precision_is_for_what_does_not_train():
    model = tied().bfloat16()
    shared = linked_named(model, "default")[""]
    assert shared.lora_A.dtype == torch.float32
    assert model.first.base.weight.dtype == torch.bfloat16
    lower_adapters(model, "default")
    assert shared.lora_A.dtype == torch.bfloat16


def test_an_adapter_counts_what_it_reads_but_does_not_own_it():
    model = tied()
    first, second = adapters_named(model, "default").values()
    assert linked_modules([first, second]) == [first.linked["factors"]]
    assert "lora_A" not in dict(first.named_parameters())
    groups = pair_groups({"first": first, "second": second})
    assert sorted(len(spec.params) for spec in groups.values()) == [6]  # two of each layer, two of both
    for parameter in first.parameters():
        parameter.requires_grad_(False)
    assert trains(first)
    set_trainable(model, [])
    assert not trains(first)


def test_an_owner_that_calls_its_children_in_a_row_is_not_disturbed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    inject(model, TiedLoRA(), ["0", "1"], also_train=())
    assert isinstance(model.adapters, LinkedAdapters)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(model(x), model[1].base(model[0].base(x)))
    assert isinstance(model.adapters["default"], SharedFactors)
