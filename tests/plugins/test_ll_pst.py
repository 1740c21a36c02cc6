"""PST: the contract, and every invariant of the paper and of our reading of it."""

from __future__ import annotations

import math

import pytest
import torch
from kept_memory import kept_bytes
from resuming import SaveAt, assert_equal_runs, at_step, run
from torch import nn
from toy_runs import classification, encoder_folder, labelled_data
from transformers import BertForSequenceClassification

import lora_lightning as ll
from ll_lora import LoRA
from ll_pst import PST
from ll_pst.callback import PSTSchedule
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.errors import NoEffectError, SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge_model import merge, unmerge
from lora_lightning.injection.records import adapters_named
from lora_lightning.testing import BASE_KINDS, MethodContract, perturb
from lora_lightning.testing.toy_models import LAYERS, seeded


class TestPST(MethodContract):
    method = PST(rank=2, score_rank=2, scaling=0.5)
    base_kinds = ("Linear",)
    repeated = ("test_compiles",)
    test_refuses_other_kinds_of_layer = None  # they are in the class below, which is slow


@pytest.mark.slow
class TestPSTOnEveryKind(MethodContract):
    method = PST(rank=2, score_rank=3)


METHOD = PST(rank=2, score_rank=3, scaling=0.5, score_scaling=0.3, line_scaling=0.7)


def adapted(sparsity=0.0, kind="Linear", method=METHOD, dtype=torch.float64, moved=True):
    make_layer, make_input = LAYERS[kind]
    with seeded(1):
        model, x = nn.Sequential(make_layer()).to(dtype).eval(), make_input()
    inject(model, method, ["0"], also_train=(), seed=0)
    adapter = model[0].adapter("default")
    if moved:
        perturb(adapter)
    adapter.prune(sparsity)
    return model, adapter, x.to(dtype) if x.is_floating_point() else x


def reference_mask(S, sparsity):
    """By a loop in plain Python: the entries of least score, of equal ones the first."""
    scores = S.flatten().tolist()
    out = sorted(range(len(scores)), key=lambda i: (scores[i], i))[: math.floor(len(scores) * sparsity)]
    return torch.tensor([i not in out for i in range(len(scores))]).view(S.shape)


def scores_of(adapter, W):
    U, V, A, B = adapter.lora_B, adapter.lora_A, adapter.score_B, adapter.score_A
    hat = W + 0.5 * U @ V
    lines = adapter.score_rows[:, None] * torch.ones_like(W) + torch.ones_like(W) * adapter.score_columns
    return hat.detach(), (hat.abs() + 0.3 * A @ B + 0.7 * lines).detach()


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_the_output_is_that_of_the_masked_weight_and_gradients_go_straight_through(sparsity):
    model, adapter, x = adapted(sparsity)
    W, b = model[0].base.weight.detach(), model[0].base.bias.detach()
    hat, S = scores_of(adapter, W)
    M = reference_mask(S, sparsity).double()
    y = model.train()(x)
    torch.testing.assert_close(y, x @ (M * hat).T + b, rtol=0, atol=1e-12)
    y.square().sum().backward()
    D = 2 * y.detach().T @ x  # dL/d(M * What)
    dS, U, V = D * hat, adapter.lora_B.detach(), adapter.lora_A.detach()
    d_hat = D * M + dS * hat.sign()
    expected = {
        "lora_B": 0.5 * d_hat @ V.T,
        "lora_A": 0.5 * U.T @ d_hat,
        "score_B": 0.3 * dS @ adapter.score_A.detach().T,
        "score_A": 0.3 * adapter.score_B.detach().T @ dS,
        "score_rows": 0.7 * dS.sum(1),
        "score_columns": 0.7 * dS.sum(0),
    }
    assert {name for name, _ in adapter.named_parameters()} == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(getattr(adapter, name).grad, gradient, rtol=0, atol=1e-11)
    assert model[0].base.weight.grad is None


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_each_matrix_has_its_number_of_zeros_and_a_merge_computes_the_same(kind):
    model, adapter, x = adapted(0.37, kind)
    weight = adapter.merged_weight(model[0].base_layer.weight())
    removed = math.floor(0.37 * weight.shape[-1] * weight.shape[-2])
    assert (weight == 0).flatten(-2).sum(-1).eq(removed).all()
    before, original = model(x), model[0].base.weight.detach().clone()
    merge(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-10)
    assert int((model[0].base.weight == 0).sum()) == int((weight == 0).sum())
    unmerge(model)
    assert torch.equal(model[0].base.weight, original)


def test_the_start_is_magnitude_pruning():
    _, adapter, _ = adapted(0.5, moved=False)
    W = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(adapter.merged_weight(W), W * reference_mask(W.abs(), 0.5))
    assert adapter.lora_B.detach().std() > 0.4
    assert not adapter.lora_A.any()
    assert not adapter.score_A.any()


def test_nothing_of_the_size_of_the_weight_is_kept_for_backward():
    kept = []
    for method in (LoRA(rank=4), PST(rank=4, score_rank=4)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
        inject(model, method, ["0", "1"], also_train=())
        kept.append(kept_bytes(model, torch.randn(5, 64, dtype=torch.bfloat16)))
    assert kept[1] <= kept[0]
    assert kept[1] <= 2 * (5 * 64 * 2 + 8)  # the output of each layer, and one number


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_the_ramp_is_the_authors():
    """v(0) = 0, it never falls, v_f (1 - 1/8) half way, v_f at the end."""
    schedule, (_, adapter, _) = PSTSchedule(0.9, 0.1, 0.7), adapted()
    T, found = 200, [int(adapter.removed) / 30]
    schedule.on_start(T, {})
    for step in range(1, T + 1):
        schedule.on_stepped(step, {"0": adapter})
        v = schedule.metrics()["sparsity"]
        expected = 0.9 * (1 - (1 - min(max(step - 0.1 * T, 0) / (T - 0.4 * T), 1)) ** 3)
        assert v == pytest.approx(expected, abs=1e-12)
        assert int(adapter.removed) == math.floor(30 * v + 1e-9)
        found.append(v)
    assert found[0] == 0
    assert found == sorted(found)
    assert found[80] == pytest.approx(0.9 * 7 / 8)
    assert schedule.finished(140)
    assert not schedule.finished(139)


def test_what_an_earlier_run_has_pruned_stays_pruned():
    _, adapter, _ = adapted(0.8)
    schedule = PSTSchedule(0.5, 2, 4)
    schedule.on_start(10, {})
    for step in range(1, 11):
        schedule.on_stepped(step, {"0": adapter})
    assert int(adapter.removed) == 24


def test_the_schedule_resumes_exactly_and_a_run_exports_a_sparse_model(tmp_path):
    method = PST(rank=2, score_rank=2, sparsity=0.6, start=2, end=5)
    encoder, saved = encoder_folder(tmp_path / "encoder"), tmp_path / "saved.ckpt"
    module, data = classification(encoder, method), labelled_data(encoder)
    whole = run(module, data, tmp_path / "whole", [SaveAt(saved, at_step(3))], max_steps=6)
    resumed = run(classification(encoder, method), data, tmp_path / "resumed", checkpoint=saved, max_steps=6)
    assert_equal_runs(whole, resumed)
    ll.export(module.model, tmp_path / "sparse", format="merged")
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "sparse")
    for path in adapters_named(module.model, "default"):
        weight = plain.get_submodule(path).weight
        assert int((weight == 0).sum()) == math.floor(0.6 * weight.numel())


def test_groups_have_no_weight_decay():
    _, adapter, _ = adapted()
    groups = METHOD.param_groups({"0": adapter})
    assert {name: group.weight_decay for name, group in groups.items()} == {"A": 0.0, "B": 0.0, "other": 0.0}


def test_a_model_without_a_pruned_weight_is_refused():
    adapter = LoRA(rank=2).build(core_base_layer(nn.Linear(6, 5)))
    with pytest.raises(NoEffectError, match=r"trainable adapters with a pruned weight \(PST\)"):
        PSTSchedule(0.5, 2, 4).select({"0": adapter})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"PST.rank is 0; it must be at least 1"),
        ({"score_rank": 0}, r"PST.score_rank is 0; it must be at least 1"),
        ({"sparsity": 1.0}, r"PST.sparsity is 1.0; it must lie in \[0, 1\)"),
        ({"start": -1.0}, r"PST.start is -1.0; it must be at least 0"),
        ({"start": 0.8}, r"PST.end is 0.7; it must come after start, which is 0.8"),
        ({"scaling": 0.0}, r"PST.scaling is 0.0; it must be above 0"),
        ({"line_scaling": -1.0}, r"PST.line_scaling is -1.0; it must be at least 0"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        PST(**settings)


def test_a_score_rank_above_the_layers_size():
    with pytest.raises(SettingsError, match=r"score_rank is 9; a layer of 6 inputs and 5 outputs takes at most 5"):
        PST(rank=2, score_rank=9).build(core_base_layer(nn.Linear(6, 5)))
