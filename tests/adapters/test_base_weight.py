"""What the base weight holds: the original, what is folded densely, and noise, each against a sum written out."""

from __future__ import annotations

import pytest
import torch
from one_layer import adapted, base_of
from torch import nn
from toy_quantized import RowScaledBase, RowScaledLinear

from ll_lora import LoRA
from lora_lightning.adapters.base_weight import BaseWeight
from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate
from lora_lightning.adapters.noise import Noise
from lora_lightning.errors import AdapterStateError
from lora_lightning.testing import BASE_KINDS

NOISE = Noise(0, 0, "0", 0.1)


def held(kind: str, dtype: torch.dtype = torch.bfloat16) -> BaseWeight:
    """The weight of a layer with two adapters' dense updates."""
    base = base_of(kind, dtype)[0]
    weight = BaseWeight(base, nn.ModuleDict())
    for seed, name in enumerate(("one", "two")):
        update = DenseUpdate(base)
        update.delta.copy_(torch.randn(update.delta.shape, generator=torch.Generator().manual_seed(seed)))
        weight.replace_folded(name, update)
    return weight


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_the_weight_is_the_sum_rounded_once(kind: str) -> None:
    weight = held(kind)
    base = weight.base_layer
    original = base.weight().detach().clone()
    deltas = {name: weight.folded(name).delta for name in ("one", "two")}
    weight.hold(("one", "two"), NOISE)
    noise = 0.1 * NOISE.values(original.shape)
    expected = original.float() + deltas["one"] + deltas["two"] + noise
    assert torch.equal(base.weight(), expected.bfloat16())
    weight.hold(("two",), None)
    assert torch.equal(base.weight(), (original.float() + deltas["two"]).bfloat16())
    assert torch.equal(weight.pretrained(torch.bfloat16), original)
    assert torch.equal(weight.clean("one", torch.float32), original.float() + deltas["one"])
    assert torch.equal(weight.clean("absent", torch.float32), original.float())
    weight.hold((), None)
    assert torch.equal(base.weight(), original)
    assert weight.original is None


def test_nothing_is_kept_where_nothing_is_written() -> None:
    weight = held("Linear")
    version = weight.base_layer.version
    weight.hold((), None)
    assert weight.original is None
    assert weight.base_layer.version == version


def test_the_original_is_kept_on_the_cpu_in_its_own_dtype() -> None:
    weight = held("Linear")
    weight.hold(("one",), None)
    kept, bias = weight.original
    assert (kept.device.type, kept.dtype, bias.dtype) == ("cpu", torch.bfloat16, torch.bfloat16)
    assert kept.data_ptr() != weight.base_layer.stored.data_ptr()
    assert kept is weight.keep()


def test_only_dense_updates_are_in_the_weight() -> None:
    base = base_of("Linear")[0]
    weight = BaseWeight(base, nn.ModuleDict({"factors": FactoredUpdate(base), "dense": DenseUpdate(base)}))
    assert weight.with_factors(base, "dense") is base
    assert weight.with_factors(base, "absent") is base
    assert weight.with_factors(base, "factors").wrapped is base
    weight.hold(("factors",), None)
    assert weight.original is None


def test_what_is_lost_is_not_read() -> None:
    weight = held("Linear")
    weight.write_merged(torch.zeros(5, 6), None, keep_original=False)
    for read in (weight.originals, lambda: weight.pretrained(torch.float32), lambda: weight.clean("one")):
        with pytest.raises(AdapterStateError, match="keep_original=False; the original weight is gone"):
            read()


def test_a_quantized_weight_is_read_and_not_rewritten() -> None:
    base = RowScaledBase(RowScaledLinear(nn.Linear(6, 5)))
    weight = BaseWeight(base, nn.ModuleDict())
    assert torch.equal(weight.pretrained(torch.float32), base.dequantize())
    assert base.pretrained_weight(torch.float32).equal(base.dequantize())
    with pytest.raises(AdapterStateError, match="stored as row-scaled int8, and noise would have to be written into"):
        weight.check_rewritable((), "noise")


def test_originals_are_those_before_the_merge() -> None:
    layer = adapted("Linear", method=LoRA(rank=2, alpha=4.0, bias=True))
    weight, bias = layer.base.weight.clone(), layer.base.bias.clone()
    layer.merge()
    assert torch.equal(layer.original_weight(), weight)
    assert torch.equal(layer.originals()["bias"], bias)


def test_noise_comes_off_bit_for_bit():
    layer, x = adapted(dtype=torch.bfloat16), torch.randn(3, 6).bfloat16()
    before, outputs = layer.base_layer.stored.clone(), layer(x)
    layer.set_noise(Noise(0, 0, "0", 0.1))
    assert not torch.equal(layer.base_layer.stored, before)
    layer.disabled = True
    assert torch.equal(layer.base_layer.stored, before)
    layer.disabled = False
    layer.set_noise(None)
    assert torch.equal(layer.base_layer.stored, before)
    assert torch.equal(layer(x), outputs)


def test_a_shared_weight_is_not_rewritten():
    layer = adapted()
    layer.tied_to = ("head",)
    with pytest.raises(AdapterStateError, match="the weight is shared with head"):
        layer.set_noise(Noise(0, 0, "0", 0.1))
    with pytest.raises(AdapterStateError, match="untie it first"):
        layer.set_folded("default", DenseUpdate(layer.base_layer))
    assert layer.folded("default") is None
