from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ll_lora import LoRA
from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.errors import AdapterStateError
from lora_lightning.testing import BASE_KINDS, perturb
from lora_lightning.testing.toy_models import LAYERS


def adapted(kind: str = "Linear", dtype: torch.dtype = torch.float32, method: LoRA | None = None) -> AdaptedLayer:
    base = core_base_layer(LAYERS[kind][0]().to(dtype))
    assert base is not None
    layer = AdaptedLayer(base)
    adapter = (method or LoRA(rank=2, alpha=4.0)).build(base)
    adapter.reset(torch.Generator().manual_seed(0))
    layer.add("default", adapter)
    perturb(adapter)
    return layer.requires_grad_(False)


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


def test_merge_rounds_weight_and_bias_once() -> None:
    layer = adapted("Linear", torch.bfloat16, LoRA(rank=2, alpha=4.0, bias=True))
    adapter = layer.adapter("default")
    weight = (layer.base.weight.double() + 2.0 * adapter.lora_B.double() @ adapter.lora_A.double()).float().bfloat16()
    bias = (layer.base.bias.float() + adapter.bias_delta).bfloat16()
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    layer.merge()
    assert torch.equal(layer.base.weight, weight)
    assert torch.equal(layer.base.bias, bias)
    assert torch.equal(layer.bias, bias)


def test_merge_gives_a_bias_to_a_layer_without_one_and_takes_it_back() -> None:
    layer = adapted("Linear without bias", method=LoRA(rank=2, alpha=4.0, bias=True))
    x = torch.randn(3, 6)
    before, keys = layer(x), set(layer.state_dict())
    layer.merge()
    assert layer.base.bias is not None
    torch.testing.assert_close(layer(x), before)
    assert set(layer.originals()) == {"weight"}
    layer.unmerge()
    assert layer.base.bias is None
    assert set(layer.state_dict()) == keys


def test_originals_are_those_before_the_merge() -> None:
    layer = adapted("Linear", method=LoRA(rank=2, alpha=4.0, bias=True))
    weight, bias = layer.base.weight.clone(), layer.base.bias.clone()
    layer.merge()
    assert torch.equal(layer.original_weight(), weight)
    assert torch.equal(layer.originals()["bias"], bias)


def test_merge_without_original_is_final() -> None:
    layer = adapted()
    layer.merge(keep_original=False)
    assert not layer.can_unmerge
    with pytest.raises(AdapterStateError, match="keep_original=False; the original weight is gone"):
        layer.unmerge()
    with pytest.raises(AdapterStateError, match="the original weight is gone"):
        layer.original_weight()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_mergeable_names_what_is_not_finite(value: float) -> None:
    layer = adapted()
    with torch.no_grad():
        layer.adapter("default").get_parameter("lora_B")[0, 0] = value
    with pytest.raises(AdapterStateError, match='adapter "default": lora_B holds values that are not finite'):
        layer.check_mergeable()


def test_check_mergeable_sees_an_overflow_of_the_stored_dtype() -> None:
    layer = adapted(dtype=torch.float16)
    with torch.no_grad():
        for parameter in layer.adapter("default").parameters():
            parameter.fill_(1e4)
    with pytest.raises(AdapterStateError, match=r"the merged weight overflows torch\.float16"):
        layer.check_mergeable()


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
