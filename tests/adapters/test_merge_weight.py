"""A merge of one layer and the way back, plain and quantized."""

from __future__ import annotations

import pytest
import torch
from one_layer import adapted
from toy_quantized import RowScaledBase, RowScaledLinear

from ll_lora import LoRA
from lora_lightning.adapters.merge_weight import Merging
from lora_lightning.errors import AdapterStateError


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


def test_adapters_are_summed_in_order_with_what_they_have_folded() -> None:
    layer = adapted(dtype=torch.float64)
    second = LoRA(rank=1, alpha=1.0).build(layer.base_layer)
    second.reset(torch.Generator().manual_seed(1))
    layer.add("second", second)
    torch.nn.init.ones_(second.lora_B)
    first = layer.adapter("default")
    weight, bias = Merging(layer.base_weight).merged({"default": (first, None), "second": (second, None)})
    product = 2.0 * first.lora_B @ first.lora_A + second.lora_B @ second.lora_A
    torch.testing.assert_close(weight, layer.base.weight + product)
    assert torch.equal(bias, layer.base.bias)


def test_a_merge_of_others_is_refused_until_this_one_is_taken_out() -> None:
    layer = adapted()
    layer.merge()
    with pytest.raises(AdapterStateError, match="default is merged already; call unmerge first"):
        layer.merging.check({"other": (layer.adapter("default"), None)})
    with pytest.raises(AdapterStateError, match="default is merged; call unmerge first"):
        layer.merging.check_unmerged()
    layer.unmerge()
    layer.merging.check_unmerged()


def test_a_final_merge_is_the_original_from_then_on() -> None:
    layer = adapted()
    layer.merge(keep_original=False)
    layer.merging.make_final()
    assert layer.merged == ()
    assert layer.can_unmerge
    assert torch.equal(layer.original_weight(), layer.base.weight)


def quantized() -> RowScaledBase:
    return RowScaledBase(RowScaledLinear(torch.nn.Linear(6, 5)))


def test_a_plain_layer_stands_in_for_a_quantized_one() -> None:
    layer, x = adapted(quantized()), torch.randn(3, 6)
    held, before, state = layer.base, layer(x), layer.state_dict()
    layer.merge()
    assert type(layer.base) is torch.nn.Linear
    assert layer.base_layer.module is held
    torch.testing.assert_close(layer(x), before)
    assert torch.equal(layer.weight, layer.base.weight)
    merged = layer.state_dict()  # still that of the quantized layer
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[key], value) for key, value in state.items())
    layer.unmerge()
    assert layer.base is held
    assert torch.equal(layer(x), before)


def test_a_quantized_layer_that_is_not_kept_is_gone() -> None:
    layer, x = adapted(quantized()), torch.randn(3, 6)
    before = layer(x)
    layer.merge(keep_original=False)
    assert layer.base_layer.module is layer.base
    torch.testing.assert_close(layer(x), before)
    assert not layer.can_unmerge
    with pytest.raises(AdapterStateError, match="the original weight is gone"):
        layer.unmerge()
