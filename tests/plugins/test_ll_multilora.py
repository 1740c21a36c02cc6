"""MultiLoRA: the contract, and every invariant of the paper and of our reading of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from ll_multilora import MultiLoRA
from ll_multilora.adapter import leading_energy
from lora_lightning.errors import SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.testing import BASE_KINDS, DROPPING_KINDS, MethodContract, perturb, tiny_encoder
from lora_lightning.testing.toy_models import LAYERS

METHOD = MultiLoRA(modules=3, rank=2, alpha=4.0)
SCALAR = MultiLoRA(modules=3, rank=2, alpha=4.0, gate="scalar")
BOTH = pytest.mark.parametrize("method", [METHOD, SCALAR], ids=["vector", "scalar"])


class TestMultiLoRA(MethodContract):
    method = METHOD
    base_kinds = ("Linear",)
    repeated = ("test_compiles",)
    test_refuses_other_kinds_of_layer = None  # they are in the class below, which is slow


@pytest.mark.slow
class TestMultiLoRAOnEveryKind(MethodContract):
    method = METHOD
    base_kinds = tuple(kind for kind in BASE_KINDS if kind != "Embedding")


@pytest.mark.slow
class TestGatesAtTheMean(MethodContract):
    method = MultiLoRA(modules=2, rank=2, alpha=4.0, gate_start="mean")


@pytest.mark.slow
class TestScalarGatesWithDropout(MethodContract):
    method = MultiLoRA(modules=2, rank=2, alpha=4.0, gate="scalar", dropout=0.3)
    base_kinds = DROPPING_KINDS


def adapted(method=METHOD, layer=None, dtype=torch.float64, moved=True):
    torch.manual_seed(0)
    model = nn.Sequential(layer or nn.Linear(8, 6)).to(dtype).eval()
    inject(model, method, ["0"], also_train=(), seed=0)
    adapter = model[0].adapter("default")
    if moved:
        perturb(adapter)
    return model, adapter


def data(n=5, d_in=8):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def looped(W, b, s, A, B, g, x):
    """The paper's sum, module by module."""
    y = x @ W.T + b
    for A_i, B_i, g_i in zip(A, B, g, strict=True):
        y = y + s * g_i * (B_i @ (A_i @ x.T)).T
    return y


@BOTH
def test_outputs_and_gradients_equal_a_float64_loop_over_modules(method):
    model, adapter = adapted(method)
    names = ("lora_A", "lora_B", "gate")
    leaves = [getattr(adapter, name).detach().clone().requires_grad_() for name in names]
    own_x, x = (data().requires_grad_() for _ in range(2))
    expected = looped(model[0].base.weight.detach(), model[0].base.bias.detach(), 2.0, *leaves, x)
    expected.square().sum().backward()
    y = model(own_x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(own_x.grad, x.grad, rtol=0, atol=1e-12)
    for name, leaf in zip(names, leaves, strict=True):
        torch.testing.assert_close(getattr(adapter, name).grad, leaf.grad, rtol=0, atol=1e-11)


@BOTH
def test_permuting_the_modules_changes_nothing(method):
    model, adapter = adapted(method)
    before = model(data())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(parameter[[2, 0, 1]])
    torch.testing.assert_close(model(data()), before, rtol=0, atol=1e-13)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_model_though_factors_are_random(method, dtype):
    model, adapter = adapted(method, dtype=dtype, moved=False)
    x = data().to(dtype)
    assert torch.equal(model(x), model[0].base(x))
    assert not adapter.gate.any()
    for factor in (adapter.lora_A, adapter.lora_B):
        assert factor.all()
        assert float(factor.detach().abs().max()) <= factor.shape[-1] ** -0.5
    assert (adapter.lora_B @ adapter.lora_A).any()


@BOTH
def test_the_first_step_moves_gates_alone_and_the_second_everything(method):
    model, adapter = adapted(method, moved=False)
    start = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = build_optimizer(model, None)
    for moved in ({"gate"}, set(start)):
        optimizer.zero_grad()
        (model.train()(data()) - 1).square().mean().backward()
        assert {name for name, p in adapter.named_parameters() if p.grad.any()} == moved
        optimizer.step()
        assert {name for name, p in adapter.named_parameters() if not torch.equal(p, start[name])} == moved


def test_the_first_gradient_of_a_gate_is_that_of_the_digest():
    """dL/dg_i = s sum over tokens of dL/dy * B_i A_i x."""
    model, adapter = adapted(moved=False)
    x = data()
    y = model(x)
    y.square().sum().backward()
    for i in range(3):
        expected = (2 * y.detach() * (2.0 * x @ adapter.lora_A[i].T @ adapter.lora_B[i].T)).sum(0)
        torch.testing.assert_close(adapter.gate.grad[i], expected.detach(), rtol=0, atol=1e-12)


@BOTH
def test_the_merged_weight_is_that_of_one_lora_of_all_ranks(method):
    model, adapter = adapted(method)
    A, B = adapter.low_rank()
    assert A.shape == (6, 8)
    assert B.shape == (6, 6)
    stacked_A = torch.cat(list(adapter.lora_A))
    stacked_B = torch.cat([g[:, None] * B_i for g, B_i in zip(adapter.gate, adapter.lora_B, strict=True)], dim=1)
    torch.testing.assert_close(A, stacked_A.detach(), rtol=0, atol=0)
    torch.testing.assert_close(B, 2.0 * stacked_B.detach(), rtol=0, atol=1e-15)
    weight = model[0].base.weight
    torch.testing.assert_close(adapter.merged_weight(weight), weight + 2.0 * stacked_B @ stacked_A, rtol=0, atol=1e-13)


def test_the_rank_of_the_update_is_that_of_all_modules_together():
    model, adapter = adapted(MultiLoRA(modules=3, rank=2), nn.Linear(20, 16))
    weight = model[0].base.weight
    assert torch.linalg.matrix_rank(adapter.merged_weight(weight) - weight, rtol=1e-9) == 6


def test_one_module_with_a_gate_of_one_is_lora():
    """Steps of AdamW on both, with the gate held."""
    model, adapter = adapted(MultiLoRA(modules=1, rank=3, alpha=6.0, gate_start="mean"), moved=False)
    assert torch.equal(adapter.gate, torch.ones_like(adapter.gate))
    adapter.gate.requires_grad_(False)
    twin = nn.Sequential(copy.deepcopy(model[0].base))
    inject(twin, LoRA(rank=3, alpha=6.0), ["0"], also_train=(), seed=0)
    other = twin[0].adapter("default")
    assert torch.equal(adapter.lora_A[0], other.lora_A)
    for each in (model, twin):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for step in range(5):
            optimizer.zero_grad()
            (each.train()(data(n=5 + step)) - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(adapter.lora_A[0], other.lora_A, rtol=0, atol=1e-12)
    torch.testing.assert_close(adapter.lora_B[0], other.lora_B, rtol=0, atol=1e-12)


def test_modules_start_apart():
    _, adapter = adapted(moved=False)
    assert not torch.equal(adapter.lora_A[0], adapter.lora_A[1])
    assert not torch.equal(adapter.lora_B[0], adapter.lora_B[1])


def test_gates_have_a_group_without_decay():
    model, adapter = adapted()
    groups = METHOD.param_groups(adapters_named(model, "default"))
    assert set(groups) == {"A", "B", "gate"}
    assert groups["gate"].params == [adapter.gate]
    assert groups["gate"].weight_decay == 0.0


@pytest.mark.parametrize(("method", "gates"), [(METHOD, 3 * 6), (SCALAR, 3)], ids=["vector", "scalar"])
def test_trained_numbers(method, gates):
    assert sum(p.numel() for p in adapted(method)[1].parameters()) == 3 * 2 * (8 + 6) + gates


def test_leading_energy_is_that_of_the_formed_update():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(6, 20, generator=generator), torch.randn(9, 6, generator=generator)
    values = torch.linalg.svdvals((B @ A).double()).square()
    for count in (1, 2, 6):
        assert leading_energy(A, B, count) == pytest.approx(float(values[:count].sum() / values.sum()), rel=1e-5)
    assert leading_energy(A, torch.zeros_like(B), 2) == 0.0
    rows = torch.eye(6)
    assert leading_energy(rows, rows, 2) == pytest.approx(1 / 3)


def test_the_report_says_how_much_lies_in_as_many_directions_as_a_module_has():
    model, adapter = adapted()
    facts = METHOD.report(adapters_named(model, "default"))
    weight = model[0].base.weight.detach()
    values = torch.linalg.svdvals(adapter.merged_weight(weight).detach() - weight).square()
    assert facts["leading_energy"] == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-9)
    assert facts["layers"] == {"0": facts["leading_energy"]}


def test_stacked_experts_have_modules_each():
    model, adapter = adapted(METHOD, LAYERS["Experts"][0]())
    assert adapter.lora_A.shape == (3, 3, 2, 6)
    assert adapter.gate.shape == (3, 3, 5)
    weight = model[0].base_layer.weight().detach()
    for expert in range(3):
        own = sum(
            2.0 * adapter.gate[expert, i][:, None] * (adapter.lora_B[expert, i] @ adapter.lora_A[expert, i])
            for i in range(3)
        )
        torch.testing.assert_close(adapter.merged_weight(weight)[expert], weight[expert] + own, rtol=0, atol=1e-13)


@pytest.mark.slow
@BOTH
def test_it_travels_as_an_exact_lora_of_all_ranks(method, tmp_path):
    model = tiny_encoder()
    ll.inject(model, method, ["query"], seed=0)
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapter("default"), size=0.1)
    report = ll.export(model, tmp_path / "out")
    assert report.kind == "exact LoRA"
    again = tiny_encoder()
    adapter = ll.import_peft(again, tmp_path / "out")
    assert adapter.method.rank == 6
    tokens = torch.tensor([[1, 5, 7, 2]])
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules": 0}, r"MultiLoRA.modules is 0; it must be at least 1"),
        ({"rank": 0}, r"MultiLoRA.rank is 0; it must be at least 1"),
        ({"gate": "vectors"}, r'MultiLoRA.gate is "vectors". Did you mean "vector"\?'),
        ({"gate_start": "one"}, r'MultiLoRA.gate_start is "one".*It takes: "zero", "mean"'),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        MultiLoRA(**settings)


def test_gates_at_zero_are_refused_on_an_embedding():
    with pytest.raises(SettingsError, match=r'gate_start is "zero"; on an embedding .* Take "mean" there'):
        adapted(METHOD, nn.Embedding(11, 5))


def test_tokens_that_the_data_lacks_keep_their_vectors():
    model, _ = adapted(MultiLoRA(modules=2, rank=2, gate_start="mean"), nn.Embedding(11, 5), moved=False)
    optimizer, ids, before = build_optimizer(model, None), torch.tensor([[1, 4]]), model[0].base.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(ids).square().sum().backward()
        optimizer.step()
    changed = (model(torch.arange(11)) != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [1, 4]
