"""SBoRA: the contract, and every invariant of the paper and of our reading of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from ll_sbora import SBoRA
from lora_lightning.errors import SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge_model import merge, unmerge
from lora_lightning.testing import BASE_KINDS, DROPPING_KINDS, MethodContract, perturb, tiny_encoder
from lora_lightning.testing.toy_models import LAYERS

COLUMNS = SBoRA(rank=3, alpha=6.0)
ROWS = SBoRA(rank=3, alpha=6.0, fixed="B")
BOTH = pytest.mark.parametrize("method", [COLUMNS, ROWS], ids=["FA", "FB"])


class TestSBoRA(MethodContract):
    method = SBoRA(rank=2, alpha=4.0)
    base_kinds = ("Linear",)
    repeated = ("test_compiles",)
    test_refuses_other_kinds_of_layer = None  # they are in the class below, which is slow


@pytest.mark.slow
class TestSBoRAOnEveryKind(MethodContract):
    method = SBoRA(rank=2, alpha=4.0)
    base_kinds = tuple(kind for kind in BASE_KINDS if kind != "Embedding")


@pytest.mark.slow
class TestSBoRAOfRows(MethodContract):
    method = SBoRA(rank=2, alpha=4.0, fixed="B")


@pytest.mark.slow
class TestSBoRAWithDropout(MethodContract):
    method = SBoRA(rank=2, alpha=4.0, dropout=0.3)
    base_kinds = DROPPING_KINDS


@pytest.mark.slow
class TestSBoRAOfRowsWithDropout(MethodContract):
    method = SBoRA(rank=2, alpha=4.0, fixed="B", dropout=0.3)
    base_kinds = DROPPING_KINDS


def adapted(method=COLUMNS, layer=None, dtype=torch.float64, moved=True, seed=0):
    torch.manual_seed(0)
    model = nn.Sequential(layer or nn.Linear(8, 6)).to(dtype).eval()
    inject(model, method, ["0"], also_train=(), seed=seed)
    adapter = model[0].adapter("default")
    if moved:
        perturb(adapter)
    return model, adapter


def data(n=5, d_in=8):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def written_out(adapter, d_in=8, d_out=6):
    """(A, B) with the selecting factor filled in entry by entry."""
    A = torch.zeros(adapter.rank, d_in, dtype=torch.float64)
    B = torch.zeros(d_out, adapter.rank, dtype=torch.float64)
    for j, i in enumerate(adapter.index.tolist()):
        if adapter.fixed == "A":
            A[j, i] = 1
        else:
            B[i, j] = 1
    return (A, adapter.lora_B.detach().clone()) if adapter.fixed == "A" else (adapter.lora_A.detach().clone(), B)


@BOTH
def test_outputs_and_gradients_equal_a_float64_reference(method):
    model, adapter = adapted(method)
    W, b = model[0].base.weight.detach(), model[0].base.bias.detach()
    A, B = (factor.requires_grad_() for factor in written_out(adapter))
    x, own_x = (data().requires_grad_() for _ in range(2))
    expected = x @ W.T + b + 2.0 * (x @ A.T) @ B.T
    expected.square().sum().backward()
    y = model(own_x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(own_x.grad, x.grad, rtol=0, atol=1e-12)
    trained, grad = (adapter.lora_B, B.grad) if method.fixed == "A" else (adapter.lora_A, A.grad)
    torch.testing.assert_close(trained.grad, grad, rtol=0, atol=1e-12)


@BOTH
def test_training_equals_lora_with_one_hot_frozen_factor(method):
    """Steps of AdamW on a LoRA whose frozen factor is written by hand."""
    model, adapter = adapted(method, moved=False)
    twin = nn.Sequential(copy.deepcopy(model[0].base))
    inject(twin, LoRA(rank=3, alpha=6.0, train="B" if method.fixed == "A" else "A"), ["0"], also_train=())
    other = twin[0].adapter("default")
    A, B = written_out(adapter)
    with torch.no_grad():
        other.lora_A.copy_(A)
        other.lora_B.copy_(B)
    for each in (model, twin):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for step in range(5):
            optimizer.zero_grad()
            (each.train()(data(n=5 + step)) - 1).square().mean().backward()
            optimizer.step()
    trained = "lora_B" if method.fixed == "A" else "lora_A"
    torch.testing.assert_close(getattr(adapter, trained), getattr(other, trained), rtol=0, atol=1e-12)
    torch.testing.assert_close(model(data()), twin(data()), rtol=0, atol=1e-12)


@BOTH
def test_the_first_gradient_is_that_of_the_selected_columns_or_rows(method):
    model, adapter = adapted(method, moved=False)
    x = data()
    y = model(x)
    y.square().sum().backward()
    G = 2 * y.detach()
    if method.fixed == "A":
        expected, found = 2.0 * G.T @ x[:, adapter.index], adapter.lora_B.grad
    else:
        expected, found = 2.0 * G[:, adapter.index].T @ x, adapter.lora_A.grad
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found.any()


@BOTH
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d"])
def test_a_merge_changes_the_selected_alone_and_an_unmerge_restores_every_bit(method, kind):
    model, adapter = adapted(method, LAYERS[kind][0](), torch.float32)
    base = model[0].base_layer
    weight = base.weight().clone()
    merge(model)
    changed = base.weight() != weight
    axis = 0 if method.fixed == "A" else 1
    touched = changed.any(dim=axis).nonzero().flatten()
    assert set(touched.tolist()) == set(adapter.index.tolist())
    unmerge(model)
    assert torch.equal(base.weight(), weight)


def test_positions_are_distinct_differ_between_layers_and_follow_the_seed():
    def positions(seed):
        model = nn.ModuleDict({"a": nn.Linear(40, 30), "b": nn.Linear(40, 30)})
        inject(model, SBoRA(rank=20), ["a", "b"], also_train=(), seed=seed)
        return [layer.adapter("default").index.tolist() for _, layer in ll.iter_adapters(model)]

    first, again, other = positions(0), positions(0), positions(1)
    assert first == again
    assert first[0] != first[1]
    assert first != other
    for index in (*first, *other):
        assert len(set(index)) == 20
        assert set(index) <= set(range(40))


def test_experts_have_positions_of_their_own():
    _, adapter = adapted(SBoRA(rank=3), LAYERS["Experts"][0]())
    assert adapter.index.shape == (3, 3)
    assert len({tuple(row) for row in adapter.index.tolist()}) > 1
    assert all(len(set(row)) == 3 for row in adapter.index.tolist())


@BOTH
def test_positions_survive_saving_and_loading(method, tmp_path):
    model = tiny_encoder()
    ll.inject(model, method, ["query"], seed=3)
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapter("default"))
    ll.save_adapter(model, tmp_path / "adapter")
    fresh = tiny_encoder()
    ll.load_adapter(fresh, tmp_path / "adapter")
    tokens = torch.tensor([[1, 5, 7, 2]])
    assert torch.equal(fresh(tokens).logits, model(tokens).logits)
    for (_, one), (_, two) in zip(ll.iter_adapters(model), ll.iter_adapters(fresh), strict=True):
        assert one.adapter("default").index.dtype == torch.int64
        assert torch.equal(one.adapter("default").index, two.adapter("default").index)


def test_all_columns_reach_the_optimum_of_full_fine_tuning():
    """On a least-squares problem, of which the optimum is known in closed form."""
    model, adapter = adapted(SBoRA(rank=4, alpha=4.0), nn.Linear(4, 6, bias=False), moved=False)
    assert sorted(adapter.index.tolist()) == [0, 1, 2, 3]
    x, y = data(20, 4), data(20, 6)
    best = torch.linalg.lstsq(x, y).solution.T
    optimizer = torch.optim.LBFGS(adapter.parameters(), lr=1.0, max_iter=200, tolerance_grad=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(adapter.merged_weight(model[0].base.weight), best, rtol=0, atol=1e-7)


def test_only_the_selected_inputs_are_kept_for_backward():
    model, _ = adapted(SBoRA(rank=3), nn.Linear(40, 6))
    x, kept = torch.randn(50, 40, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.train()(x)
    assert kept
    assert not any(t.shape == x.shape for t in kept)
    assert any(t.numel() == 50 * 3 for t in kept)


def test_two_adapters_of_disjoint_columns_do_not_touch_each_other():
    model, first = adapted(SBoRA(rank=4), nn.Linear(8, 9))
    inject(model, SBoRA(rank=4), ["0"], also_train=(), name="second", seed=1)
    second = model[0].adapter("second")
    perturb(second)
    left = [i for i in range(8) if i not in first.index.tolist()]
    second.index.copy_(torch.tensor(left))
    ll.set_active(model, ["default", "second"])
    weight = model[0].base.weight.detach().clone()
    both = (second.merged_weight(first.merged_weight(weight)) - weight).detach()
    torch.testing.assert_close(both[:, first.index], first.scaling * first.lora_B.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(both[:, second.index], second.scaling * second.lora_B.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("method", "numbers"), [(COLUMNS, 3 * 6), (ROWS, 3 * 8)], ids=["FA", "FB"])
def test_trained_numbers(method, numbers):
    """r d_out for columns, r d_in for rows."""
    assert sum(p.numel() for p in adapted(method)[1].parameters()) == numbers


@pytest.mark.slow
@BOTH
def test_it_travels_as_an_exact_lora(method, tmp_path):
    model = tiny_encoder()
    ll.inject(model, method, ["query"], seed=0)
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapter("default"), size=0.1)
    report = ll.export(model, tmp_path / "out")
    assert report.kind == "exact LoRA"
    assert not report.discarded
    again = tiny_encoder()
    ll.import_peft(again, tmp_path / "out")
    tokens = torch.tensor([[1, 5, 7, 2]])
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"SBoRA.rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, r"SBoRA.alpha is 0.0; it must be above 0"),
        ({"dropout": 1.0}, r"SBoRA.dropout is 1.0; it must lie in \[0, 1\)"),
        ({"fixed": "a"}, r'SBoRA.fixed is "a". Did you mean "A"\? It takes: "A", "B"'),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        SBoRA(**settings)


def test_columns_of_an_embedding_are_refused():
    with pytest.raises(SettingsError, match=r'fixed is "A"; the columns of an embedding are its tokens.*Take "B"'):
        adapted(COLUMNS, nn.Embedding(11, 5))
