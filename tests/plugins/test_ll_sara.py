"""SaRA: the contract, and every invariant of the paper and of our reading of it."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from kept_memory import kept_bytes
from resuming import SaveAt, assert_equal_runs, at_step, run
from torch import nn
from toy_runs import classification, encoder_folder, labelled_data

import lora_lightning as ll
from ll_lora import LoRA
from ll_sara import SaRA
from ll_sara.callback import Reselection
from ll_sara.functional import nuclear_norm
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.errors import NoEffectError, SettingsError, TargetError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge_model import merge, unmerge
from lora_lightning.injection.records import adapters_named
from lora_lightning.testing import BASE_KINDS, MethodContract, perturb
from lora_lightning.testing.toy_models import LAYERS, seeded


class TestSaRA(MethodContract):
    method = SaRA(threshold=0.15, nuclear=0.01)
    base_kinds = ("Linear",)
    random_start = False
    repeated = ("test_compiles",)
    test_refuses_other_kinds_of_layer = None  # they are in the class below, which is slow


@pytest.mark.slow
class TestSaRAOnEveryKind(MethodContract):
    method = SaRA(threshold=None, density=0.3)
    random_start = False


def adapted(method=None, kind="Linear", dtype=torch.float64, moved=True):
    make_layer, make_input = LAYERS[kind]
    with seeded(1):
        model, x = nn.Sequential(make_layer()).to(dtype).eval(), make_input()
    inject(model, method or SaRA(threshold=0.15), ["0"], also_train=(), seed=0)
    adapter = model[0].adapter("default")
    if moved:
        perturb(adapter)
    return model, adapter, x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize("kind", BASE_KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_entries_below_the_threshold_train_and_all_others_stay_bit_for_bit(kind, dtype):
    model, adapter, _ = adapted(SaRA(threshold=0.2), kind, dtype)
    base = model[0].base_layer
    P0, small = base.weight().detach().clone(), base.weight().detach().abs() < 0.2
    assert adapter.values.numel() == int(small.sum())
    merge(model)
    P = base.weight().detach()
    assert torch.equal(P[~small], P0[~small])
    torch.testing.assert_close(P[small], adapter.values.detach().to(dtype), rtol=1e-2, atol=1e-12)
    unmerge(model)
    assert torch.equal(base.weight(), P0)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_a_density_takes_the_smallest_entries_of_each_layer(density):
    model, adapter, _ = adapted(SaRA(threshold=None, density=density), moved=False)
    sizes = sorted(model[0].base.weight.detach().abs().flatten().tolist())
    count = round(30 * density)
    assert sorted(adapter.origin.abs().tolist()) == sizes[:count]
    assert float(adapter.limit) == (sizes[count] if count < 30 else float("inf"))


def test_gradients_are_the_weights_own_in_these_places():
    model, adapter, x = adapted()
    W = adapter.merged_weight(model[0].base.weight).detach().requires_grad_()
    (x @ W.T + model[0].base.bias.detach()).square().sum().backward()
    model.train()(x).square().sum().backward()
    torch.testing.assert_close(adapter.values.grad, W.grad.flatten()[adapter.indices.long()], rtol=0, atol=1e-11)


def test_with_every_entry_it_is_full_fine_tuning():
    """Five steps of AdamW with weight decay, which acts on the entries themselves."""
    model, adapter, x = adapted(SaRA(threshold=100.0, nuclear=0.0), moved=False)
    full = copy.deepcopy(model[0].base).requires_grad_()
    full.bias.requires_grad_(requires_grad=False)
    optimizers = [torch.optim.AdamW(p, lr=0.05, weight_decay=0.1) for p in ([adapter.values], [full.weight])]
    for _ in range(5):
        for each, optimizer in zip((model.train(), full), optimizers, strict=True):
            optimizer.zero_grad()
            (each(x) - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(adapter.merged_weight(model[0].base.weight), full.weight, rtol=0, atol=1e-12)
    assert optimizers[0].state[adapter.values]["exp_avg"].numel() == adapter.values.numel()


# -- the nuclear norm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 6), (7, 4), (3, 5, 4)])
def test_the_nuclear_norm_and_its_gradient_equal_autograds(shape):
    own, theirs = (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for _ in "12")
    found, expected = nuclear_norm(own.requires_grad_()), torch.linalg.matrix_norm(theirs.requires_grad_(), "nuc").sum()
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(own.grad, theirs.grad, rtol=0, atol=1e-11)


def test_directions_that_are_not_there_have_no_gradient():
    a, b = torch.tensor([[3.0], [4.0], [0.0]]).double(), torch.tensor([[1.0, 0.0, 0.0]]).double()
    matrix = (a @ b).requires_grad_()
    norm = nuclear_norm(matrix)
    norm.backward()
    assert float(norm.detach()) == pytest.approx(5.0)
    torch.testing.assert_close(matrix.grad, (a / 5) @ b, rtol=0, atol=1e-12)


def test_the_penalty_is_that_of_the_masked_weights_of_all_layers():
    method = SaRA(threshold=0.15, nuclear=0.3)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).double()
    with seeded(1):
        for layer in model:
            nn.init.normal_(layer.weight, std=0.2)
    weights = [layer.weight.detach().clone() for layer in model]
    inject(model, method, ["0", "1"], also_train=(), seed=0)
    adapters = adapters_named(model, "default")
    penalty = method.penalty(adapters)
    masked = [torch.where(W.abs() < 0.15, W, 0.0) for W in weights]
    expected = sum(float(torch.linalg.svdvals(W).sum()) for W in masked)
    assert float(penalty.detach()) == pytest.approx(0.3 * expected)
    penalty.backward()
    for adapter, W in zip(adapters.values(), masked, strict=True):
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        gradient = 0.3 * (U @ Vh).flatten()[adapter.indices.long()]
        torch.testing.assert_close(adapter.values.grad, gradient, rtol=0, atol=1e-10)
    assert SaRA(nuclear=0.0).penalty(adapters) is None


# -- choosing again ----------------------------------------------------------------------------------------------------


def test_what_has_grown_leaves_and_keeps_its_value_whatever_the_optimizer_does():
    model, adapter, x = adapted()
    W0 = model[0].base.weight.detach()
    now = adapter.merged_weight(W0).detach()
    adapter.select_again(adapter.values.detach())
    places = adapter.indices.long()
    second = now.flatten()[places].abs() < 0.15
    assert 0 < int(second.sum()) < len(places)
    assert torch.equal(adapter.live, second)
    assert torch.equal(adapter.merged_weight(W0), now)
    optimizer = torch.optim.AdamW([adapter.values], lr=0.1, weight_decay=0.5)
    (model.train()(x) - 1).square().mean().backward()
    assert not adapter.values.grad[~second].any()
    optimizer.step()
    after = adapter.merged_weight(W0).flatten()[places]
    assert torch.equal(after[~second], now.flatten()[places][~second])
    assert (after[second] != now.flatten()[places][second]).all()
    adapter.select_again(adapter.values.detach())
    assert not (adapter.live & ~second).any()


def test_a_run_chooses_once_clears_the_optimizers_state_and_resumes_exactly(tmp_path):
    method = SaRA(threshold=0.01, nuclear=0.0, reselect=3)
    encoder, saved = encoder_folder(tmp_path / "encoder"), tmp_path / "saved.ckpt"
    data, seen = labelled_data(encoder), []
    module, again = (classification(encoder, method, optimizer=partial(torch.optim.AdamW, lr=5e-3)) for _ in "12")

    class Watch(SaveAt):
        def on_train_batch_end(self, trainer, pl_module, *words):
            super().on_train_batch_end(trainer, pl_module, *words)
            own = adapters_named(pl_module.model, "default").values()
            states = trainer.optimizers[0].state
            seen.append((sum(int(a.live.sum()) for a in own), any(a.values in states for a in own)))

    whole = run(module, data, tmp_path / "whole", [Watch(saved, at_step(3))], max_steps=5)
    assert [known for _, known in seen] == [True, True, False, True, True]
    total = sum(adapter.values.numel() for adapter in adapters_named(module.model, "default").values())
    counts = [count for count, _ in seen]
    assert counts[:2] == [total, total]
    assert 0 < counts[2] == counts[3] == counts[4] < total
    resumed = run(again, data, tmp_path / "resumed", checkpoint=saved, max_steps=5)
    assert_equal_runs(whole, resumed)
    assert method.report(adapters_named(module.model, "default")) == {"entries": total, "live_entries": counts[2]}


@pytest.mark.parametrize("moment", [1.0, 6, 9])
def test_a_moment_outside_the_run_is_refused(moment):
    with pytest.raises(SettingsError, match=rf"SaRA.reselect is {moment}, step \d of a run of 6; it must lie inside"):
        Reselection(moment).check_run(6, [])


def test_a_model_without_such_entries_is_refused():
    adapter = LoRA(rank=2).build(core_base_layer(nn.Linear(6, 5)))
    with pytest.raises(NoEffectError, match=r"trainable adapters with entries of a weight \(SaRA\)"):
        Reselection(3).select({"0": adapter})


# -- layers, memory, settings ------------------------------------------------------------------------------------------


def test_a_layer_without_small_entries_is_left_out():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    nn.init.constant_(model[0].weight, 0.5)
    inject(model, SaRA(threshold=0.2), ["0", "1"], also_train=(), seed=0)
    assert list(adapters_named(model, "default")) == ["1"]
    with pytest.raises(TargetError, match="nothing would be adapted"):
        inject(nn.Sequential(nn.Linear(6, 5)), SaRA(threshold=1e-30), ["0"], also_train=())


def test_it_adds_to_another_adapter_on_the_layer_dropout_included():
    model, _, x = adapted(SaRA(threshold=0.15))
    inject(model, LoRA(rank=2, dropout=0.5), ["0"], also_train=(), name="second", seed=1)
    perturb(model[0].adapter("second"))
    outputs = {}
    for names in (("default",), ("second",), ("second", "default"), ("default", "second")):
        ll.set_active(model, list(names))
        with seeded(4):
            outputs[names] = model.train()(x)
    base = model[0].base(x)
    total = outputs["default",] + outputs["second",] - base
    torch.testing.assert_close(outputs["second", "default"], total, rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs["default", "second"], total, rtol=0, atol=1e-12)


def test_nothing_of_the_size_of_the_weight_is_kept_for_backward():
    kept = []
    for method in (LoRA(rank=4), SaRA(threshold=None, density=0.1)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
        inject(model, method, ["0", "1"], also_train=())
        kept.append(kept_bytes(model, torch.randn(5, 64, dtype=torch.bfloat16)))
    assert kept[1] == 2 * 5 * 64 * 2 <= kept[0]  # the outputs of both layers


def test_a_threshold_on_a_model_without_values_is_refused():
    base = core_base_layer(nn.Linear(6, 5, device="meta"))
    with pytest.raises(SettingsError, match=r"threshold is 0.002; .* Give density, the fraction of entries"):
        SaRA().build(base)
    assert SaRA(threshold=None, density=0.5).build(base).values.shape == (15,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, r"SaRA.threshold is 0.0; it must be above 0"),
        ({"threshold": None}, r"one of threshold and density must be null, and neither is"),
        ({"density": 0.1}, r"one of threshold and density must be null, and both are given"),
        ({"threshold": None, "density": 1.5}, r"SaRA.density is 1.5; it must lie in \(0, 1\]"),
        ({"entries": -1}, r"SaRA.entries is -1; it must be at least 0"),
        ({"nuclear": -1.0}, r"SaRA.nuclear is -1.0; it must be at least 0"),
        ({"reselect": -1.0}, r"SaRA.reselect is -1.0; it must be at least 0"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        SaRA(**settings)
