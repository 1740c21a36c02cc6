from __future__ import annotations

import copy

import pytest
import torch
from one_layer import adapted
from torch import nn

from lora_lightning.errors import AdapterStateError
from lora_lightning.testing import BASE_KINDS


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_effective_weight_is_what_a_merge_writes(kind: str) -> None:
    layer = adapted(kind, torch.bfloat16)
    effective, plain = layer.weight.clone(), layer.base.weight.clone()
    assert effective.shape == plain.shape
    assert effective.dtype == plain.dtype
    layer.disabled = True
    assert torch.equal(layer.weight, plain)
    layer.disabled = False
    layer.merge()
    assert torch.equal(layer.base.weight, effective)
    assert torch.equal(layer.weight, effective)


def test_adapters_are_found_by_name() -> None:
    layer = adapted()
    with pytest.raises(AdapterStateError, match=r'no adapter "defalt". Did you mean "default"\? Installed: default'):
        layer.adapter("defalt")
    layer.merge()
    with pytest.raises(AdapterStateError, match='adapter "default" is merged; call unmerge'):
        layer.remove("default")
    layer.unmerge()
    layer.remove("default")
    assert layer.active == ()


def test_sizes_and_options_are_the_base_layers() -> None:
    layer = adapted("Conv2d")
    assert layer.kernel_size == (3, 2)
    assert layer.stride == (2, 1)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing
    assert not hasattr(layer, "__len__")
    assert copy.deepcopy(layer).base is not layer.base


def test_a_tie_set_later_is_refused_by_torch() -> None:
    """A model that sets `layer.weight` again (tie_weights) must not silently leave the layer."""
    with pytest.raises(KeyError, match="weight"):
        adapted().weight = nn.Parameter(torch.zeros(5, 6))  # type: ignore[misc]


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_what_the_parts_of_a_layer_hold_is_registered_once(kind: str) -> None:
    """No tensor under a second name, in the state dictionary or among the modules."""
    layer = adapted(kind)
    bias = [] if layer.base.__dict__["_parameters"].get("bias") is None else ["base.bias"]
    masks = ["adapters.default.rank_mask"]
    assert sorted(layer.state_dict()) == sorted(
        ["base.weight", *bias, "adapters.default.lora_A", "adapters.default.lora_B", *masks]
    )
    modules = [id(module) for _, module in layer.named_modules(remove_duplicate=False)]
    assert len(modules) == len(set(modules))


def test_a_copy_has_parts_of_its_own() -> None:
    layer = adapted()
    layer.merge()
    twin = copy.deepcopy(layer)
    assert twin.base_layer.module is twin.base
    assert twin.merging.base_weight is twin.base_weight
    assert twin.base_weight.shifts is twin.shifts
    twin.unmerge()
    assert (layer.merged, twin.merged) == (("default",), ())
    assert torch.equal(twin.base.weight, layer.original_weight())
    assert torch.equal(twin.base_layer.pretrained_weight(torch.float32), layer.original_weight())
