"""What has been folded: both forms against sums written out, and what a layer does with them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_lightning as ll
from ll_dora import DoRA
from ll_lora import LoRA
from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate, factors_with, fits, fold, update_like
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.adapters.noise import Noise
from lora_lightning.errors import AdapterStateError
from lora_lightning.testing import perturb


def factors(stages: int, rank: int = 2, d_in: int = 6, d_out: int = 5):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(draw(rank, d_in), draw(d_out, rank)) for _ in range(stages)]


@pytest.mark.parametrize("rule", ["outer_step", "figure_ema"])
@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_both_forms_equal_the_closed_form(rule, fraction):
    base = core_base_layer(nn.Linear(6, 5).double())
    log, dense, stages = FactoredUpdate(base), DenseUpdate(base), factors(4)
    for A, B in stages:
        log.fold(A, B, fraction, rule)
        dense.fold(B @ A, fraction, rule)
    n = len(stages)
    weights = [fraction if rule == "outer_step" else 1 - (1 - fraction) ** (n - k) for k in range(n)]
    expected = sum(w * B @ A for w, (A, B) in zip(weights, stages, strict=True))
    weight = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(log.merged_weight(weight) - weight, expected)
    torch.testing.assert_close(dense.merged_weight(weight) - weight, expected)
    A, B = log.low_rank()
    torch.testing.assert_close(B @ A, expected)


def test_the_rules_agree_for_a_fraction_of_one_and_differ_from_the_second_stage_on():
    base = core_base_layer(nn.Linear(6, 5).double())
    for fraction, same in ((1.0, True), (0.5, False)):
        shifts = {}
        for rule in ("outer_step", "figure_ema"):
            shifts[rule] = DenseUpdate(base)
            for A, B in factors(3):
                shifts[rule].fold(B @ A, fraction, rule)
        one, other = shifts.values()
        assert torch.allclose(one.delta, other.delta) == same


@pytest.mark.parametrize("cls", [FactoredUpdate, DenseUpdate])
def test_state_fits_a_shift_of_its_own_shape_only(cls):
    base = core_base_layer(nn.Linear(6, 5))
    shift = cls(base)
    for A, B in factors(2):
        update = (A.float(), B.float()) if cls is FactoredUpdate else ((B @ A).float(),)
        shift.fold(*update, 0.5, "figure_ema")
    state = shift.state_dict()
    twin = update_like(base, state)
    assert type(twin) is cls
    twin.load_state_dict(state)
    assert torch.equal(twin.merged_weight(torch.zeros(5, 6)), shift.merged_weight(torch.zeros(5, 6)))
    assert update_like(core_base_layer(nn.Linear(7, 5)), state) is None
    assert update_like(base, {"other": torch.zeros(1)}) is None


def layer_with(kind: str, dtype=torch.float64, fraction: float = 1.0):
    """A model of one layer with a moved LoRA whose update has been folded, and the input, the layer and the update."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    ll.inject(model, LoRA(rank=2), ["0"], also_train=(), seed=0)
    layer = model[0]
    perturb(layer.adapter("default"))
    A, B = layer.low_rank("default")
    layer.set_folded("default", {"log": FactoredUpdate, "dense": DenseUpdate}[kind](layer.base_layer))
    layer.fold("default", fraction)
    layer.adapter("default").reset(torch.Generator().manual_seed(2))
    return model, layer, torch.randn(3, 6).to(dtype), B @ A


@pytest.mark.parametrize("kind", ["log", "dense"])
class TestFolded:
    def test_the_function_is_that_of_the_weight_with_the_update(self, kind):
        _, layer, x, update = layer_with(kind)
        original = layer.base_layer._read(layer.original_weight())
        expected = nn.functional.linear(x, original + update, layer.base.bias)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.weight, original + update)

    def test_merge_unmerge_disable_and_eject(self, kind):
        model, layer, x, _ = layer_with(kind)
        perturb(layer.adapter("default"), seed=3)
        plain, adapted, held = copy.deepcopy(model), model(x), layer.base_layer.stored.clone()
        original = layer.original_weight().clone()
        ll.merge(model)
        torch.testing.assert_close(model(x), adapted)
        ll.unmerge(model)
        assert torch.equal(layer.base_layer.stored, held)
        with ll.disable_adapters(model):
            assert torch.equal(layer.base_layer.stored, original)
            assert torch.equal(model(x), nn.functional.linear(x, original, layer.base.bias))
        assert torch.equal(model(x), adapted)
        ll.eject(model)
        assert torch.equal(model[0].weight, original)
        ll.merge(plain, keep_original=False)
        ll.eject(plain)
        torch.testing.assert_close(plain(x), adapted)

    def test_saving_and_loading(self, kind, tmp_path):
        model, layer, x, _ = layer_with(kind, torch.float32)
        perturb(layer.adapter("default"), seed=3)
        ll.save_adapter(model, tmp_path)
        torch.manual_seed(1)
        fresh = nn.Sequential(nn.Linear(6, 5))
        ll.load_adapter(fresh, tmp_path, name="other")
        assert torch.equal(fresh(x), model(x))
        assert torch.equal(fresh[0].original_weight(), layer.original_weight())
        again = copy.deepcopy(model)
        again[0].fold("default")
        ll.load_adapter(again, tmp_path)
        assert torch.equal(again(x), model(x))

    def test_another_adapter_does_not_see_it(self, kind):
        model, layer, x, _ = layer_with(kind)
        adapted = model(x)
        ll.inject(model, LoRA(rank=1), ["0"], also_train=(), name="other", seed=0)
        original = layer.base_layer._read(layer.original_weight())
        assert torch.equal(model(x), nn.functional.linear(x, original, layer.base.bias))
        ll.set_active(model, ["default"])
        assert torch.equal(model(x), adapted)
        ll.eject(model, "default")
        assert not layer.rewritten
        assert torch.equal(layer.base.weight, original)


def test_bfloat16_accumulates_in_float32():
    """An update that rounding to bfloat16 would lose each time adds up."""
    model, layer, _, _ = layer_with("dense", torch.bfloat16)
    before = layer.base_layer.stored.clone()
    step = 1e-4 * before.float()
    shift = layer.shifts["default"]
    total = shift.delta.clone()
    for _ in range(40):
        shift.fold(step, 1.0, "outer_step")
        total += step
        layer.rewrite()
    expected = (layer.original_weight().float() + total).to(torch.bfloat16)
    assert torch.equal(layer.base_layer.stored, expected)
    assert not torch.equal(layer.base_layer.stored, before)
    assert torch.equal(before + step.to(torch.bfloat16), before)
    ll.eject(model)


@pytest.mark.parametrize("cls", [FactoredUpdate, DenseUpdate])
def test_tensors_fit_by_name_and_shape(cls):
    update = cls(core_base_layer(nn.Linear(6, 5)))
    state = update.state_dict()
    assert fits(update, state)
    assert fits(None, {})
    assert not fits(update, {})
    assert not fits(None, state)
    name = next(iter(state))
    assert not fits(update, state | {name: torch.zeros(3)})
    assert not fits(update, {"other": state[name]})


def test_factors_join_those_that_were_folded():
    folded = FactoredUpdate(core_base_layer(nn.Linear(6, 5).double()))
    (A, B), own = factors(2)
    folded.fold(A, B, 0.5, "outer_step")
    joined_A, joined_B = factors_with(own, folded)
    torch.testing.assert_close(joined_B @ joined_A, own[1] @ own[0] + 0.5 * B @ A)
    started = factors_with((own[0], torch.zeros_like(own[1])), folded)  # a new stage adds no columns of zeros
    assert [tensor.shape for tensor in started] == [A.shape, B.shape]
    assert factors_with(own, None) is own
    assert factors_with(None, folded) is None
    assert factors_with(own, DenseUpdate(core_base_layer(nn.Linear(6, 5).double()))) is None


def test_what_cannot_be_folded_says_why():
    _, layer, _, _ = layer_with("log")
    base = layer.base_layer
    biased = LoRA(rank=2, bias=True).build(base)
    perturb(biased)
    with pytest.raises(AdapterStateError, match="LowRankAdapter changes the bias, which no folded update holds"):
        fold(biased, DenseUpdate(base), base, 1.0, "outer_step", None)
    scaled = DoRA(rank=2).build(base)
    scaled.reset(torch.Generator().manual_seed(0))
    with pytest.raises(AdapterStateError, match="the update of DoRAAdapter has no factors to fold; give it a Dense"):
        fold(scaled, FactoredUpdate(base), base, 1.0, "outer_step", None)
    layer.set_noise(Noise(0, 0, "0", 0.1))
    with pytest.raises(AdapterStateError, match='adapter "default": noise has no factors to fold'):
        layer.fold("default", keep_noise=True)
