"""NEAT: the contract, and every invariant of the paper and of our reading of it, peft's PEANuT beside it."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import lora_lightning as ll
from ll_neat import NEAT
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge_model import merge, unmerge
from lora_lightning.testing import MethodContract, perturb

DEPTHS = pytest.mark.parametrize("depth", [0, 1, 2])
TOKENS = torch.tensor([[1, 5, 7, 2]])


class TestNEAT(MethodContract):
    method = NEAT(rank=2, depth=1, scaling=0.5)
    base_kinds = ("Linear",)
    repeated = ("test_compiles",)
    test_refuses_other_kinds_of_layer = None  # they are in the classes below, which are slow


@pytest.mark.slow
class TestNEATOnEveryKind(MethodContract):
    method = NEAT(rank=2)


@pytest.mark.slow
class TestDeepNEATOnEveryKind(MethodContract):
    method = NEAT(rank=2, depth=2, activation="tanh", scaling=0.5)


def adapted(method, layer=None, dtype=torch.float64, moved=True):
    torch.manual_seed(0)
    model = nn.Sequential(layer or nn.Linear(8, 6)).to(dtype).eval()
    inject(model, method, ["0"], also_train=(), seed=0)
    adapter = model[0].adapter("default")
    if moved:
        perturb(adapter)
    return model, adapter


def data(n=5, d_in=8, dtype=torch.float64):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(3), dtype=dtype)


def reference_update(W, A, B, inner, s, f):
    """The equations, in the orientation of the released code: columns of W pass through a network."""
    h, saved, d = f(W.T @ A.T), [], 0 if inner is None else len(inner) // 2
    for i in range(d):
        saved.append(h)
        h = f(h @ inner[i].T)
    for i in range(d):
        h = f(h @ inner[d + i].T) + saved[d - 1 - i]
    return s * (h @ B.T).T


@DEPTHS
@pytest.mark.parametrize("activation", ["relu", "tanh", "linear"])
def test_outputs_and_gradients_equal_a_dense_float64_reference(depth, activation):
    model, adapter = adapted(NEAT(rank=3, depth=depth, activation=activation, scaling=0.5))
    names = [name for name, _ in adapter.named_parameters()]
    leaves = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters()}
    W, b = model[0].base.weight.detach(), model[0].base.bias.detach()
    f = {"relu": torch.relu, "tanh": torch.tanh, "linear": lambda x: x}[activation]
    own_x, x = (data().requires_grad_() for _ in range(2))
    update = reference_update(W, leaves["reader"], leaves["writer"], leaves.get("inner"), 0.5, f)
    expected = x @ (W + update).T + b
    expected.square().sum().backward()
    y = model.train()(own_x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(own_x.grad, x.grad, rtol=0, atol=1e-11)
    for name in names:
        torch.testing.assert_close(getattr(adapter, name).grad, leaves[name].grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(adapter.merged_weight(W), W + update, rtol=0, atol=1e-13)
    assert model[0].base.weight.grad is None


def test_without_an_activation_the_left_factor_is_linear():
    model, adapter = adapted(NEAT(rank=3, activation="linear", scaling=2.0))
    W = model[0].base.weight.detach()
    torch.testing.assert_close(
        adapter.merged_weight(W), W + 2.0 * adapter.writer @ adapter.reader @ W, rtol=0, atol=1e-13
    )


# -- peft --------------------------------------------------------------------------------------------------------------


def pefts(model, rank, depth, scaling, activation="relu"):
    config = peft.PeanutConfig(r=rank, depth=depth, scaling=scaling, act_fn=activation, target_modules=["0"])
    theirs = peft.get_peft_model(model, config)
    return theirs, theirs.base_model.model[0]


def their_tensors(layer, depth):
    own = {"reader": layer.peanut_A["default"].weight, "writer": layer.peanut_B["default"].weight}
    inner = [part.weight for part in (*layer.peanut_encoders["default"], *layer.peanut_decoders["default"])]
    return own, inner


@DEPTHS
@pytest.mark.parametrize(
    "activation", ["relu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gelu", "silu", "leaky_relu"))]
)
def test_outputs_gradients_and_a_trajectory_equal_pefts(depth, activation):
    """Ten steps of AdamW from the same start; the weight is theirs, too."""
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(8, 6))
    theirs, layer = pefts(copy.deepcopy(plain), 3, depth, 0.5, activation)
    inject(plain, NEAT(rank=3, depth=depth, scaling=0.5, activation=activation), ["0"], also_train=())
    adapter = plain[0].adapter("default")
    own, inner = their_tensors(layer, depth)
    with torch.no_grad():
        for name, value in own.items():
            getattr(adapter, name).copy_(value)
        for i, value in enumerate(inner):
            adapter.inner[i].copy_(value)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02) for m in (plain, theirs)]
    for step in range(10):
        x = data(n=4 + step, dtype=torch.float32)
        for each, optimizer in zip((plain, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (each.train()(x) - 1).square().mean().backward()
        torch.testing.assert_close(plain(x), theirs(x), rtol=1e-5, atol=1e-6)
        for name, value in own.items():
            torch.testing.assert_close(getattr(adapter, name).grad, value.grad, rtol=1e-4, atol=1e-6)
        for i, value in enumerate(inner):
            torch.testing.assert_close(adapter.inner.grad[i], value.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
    delta = adapter.merged_weight(plain[0].base.weight) - plain[0].base.weight
    torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=1e-4, atol=1e-6)


@DEPTHS
def test_the_start_is_distributed_as_pefts(depth):
    """Uniform by the length of rows, B at zero."""
    _, adapter = adapted(NEAT(rank=40, depth=depth), nn.Linear(64, 50), moved=False)
    _, layer = pefts(nn.Sequential(nn.Linear(64, 50)), 40, depth, 1.0)
    own, inner = their_tensors(layer, depth)
    assert not adapter.writer.any()
    assert not own["writer"].any()
    pairs = [(adapter.reader, own["reader"]), *((adapter.inner[i], value) for i, value in enumerate(inner))]
    for mine, theirs in pairs:
        assert float(mine.detach().abs().max()) <= mine.shape[-1] ** -0.5
        assert float(mine.detach().std()) == pytest.approx(float(theirs.detach().std()), rel=0.1)


# -- merging and stacking ----------------------------------------------------------------------------------------------


@DEPTHS
def test_a_merge_uses_the_weight_before_it_and_an_unmerge_restores_every_bit(depth):
    model, _ = adapted(NEAT(rank=3, depth=depth), dtype=torch.float32)
    weight, x = model[0].base.weight.detach().clone(), data(dtype=torch.float32)
    before = model(x)
    merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(model[0].base.weight, weight)
    assert torch.equal(model(x), before)


def test_a_second_one_on_the_layer_is_refused():
    model, _ = adapted(NEAT(rank=3))
    inject(model, NEAT(rank=3), ["0"], also_train=(), name="second", seed=1)
    with pytest.raises(AdapterStateError, match="cannot be active together: only additive updates sum"):
        ll.set_active(model, ["default", "second"])


# -- what is formed and kept -------------------------------------------------------------------------------------------


def test_nothing_of_the_size_of_the_weight_is_kept_for_backward():
    """Beside the frozen parameter itself, which a half-precision base would otherwise have widened."""
    model, _ = adapted(NEAT(rank=3), nn.Linear(40, 30), torch.bfloat16)
    weight, kept = model[0].base.weight, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.train()(data(7, 40, torch.bfloat16))
    assert kept
    assert not any(t.numel() == weight.numel() and t.data_ptr() != weight.data_ptr() for t in kept)


def test_the_hidden_matrix_is_computed_once_in_evaluation_and_is_never_stale(monkeypatch):
    model, adapter = adapted(NEAT(rank=3))
    calls, original = [], type(adapter).hidden
    monkeypatch.setattr(type(adapter), "hidden", lambda self, product: calls.append(1) or original(self, product))

    def fresh():
        return data() @ adapter.merged_weight(model[0].base.weight).T + model[0].base.bias

    with torch.no_grad():
        torch.testing.assert_close(model(data()), model(data()), rtol=0, atol=0)
        assert len(calls) == 1
        adapter.reader.mul_(1.5)
        torch.testing.assert_close(model(data()), fresh(), rtol=0, atol=1e-12)
        model[0].base_layer.write(2 * model[0].base_layer.weight() + 1)
        torch.testing.assert_close(model(data()), fresh(), rtol=0, atol=1e-12)
    model.train()(data()).sum().backward()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(data()), fresh(), rtol=0, atol=1e-12)
    assert set(adapter.state_dict()) == {"reader", "writer"}


@DEPTHS
def test_trained_numbers(depth):
    """2 r d_out + 2 d r^2."""
    numbers = sum(p.numel() for p in adapted(NEAT(rank=3, depth=depth))[1].parameters())
    assert numbers == 2 * 3 * 6 + 2 * depth * 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"NEAT.rank is 0; it must be at least 1"),
        ({"depth": -1}, r"NEAT.depth is -1; it must be at least 0"),
        ({"scaling": 0.0}, r"NEAT.scaling is 0.0; it must be above 0"),
        ({"activation": "reul"}, r'NEAT.activation is "reul". Did you mean "relu"\?'),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        NEAT(**settings)
