"""LoRS: the contract, and every invariant of the paper and of our reading of it."""

from __future__ import annotations

import copy

import pytest
import torch
from kept_memory import kept_bytes
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from ll_lors import LoRS, LoRSGradient
from lora_lightning.adapters.folded import DenseUpdate
from lora_lightning.adapters.noise import Noise
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge_model import eject, merge, unmerge
from lora_lightning.injection.probe import Probe
from lora_lightning.injection.records import adapters_named
from lora_lightning.testing import MethodContract, perturb, tiny_encoder

GRADIENTS = pytest.mark.parametrize("gradient", ["exact", "unmasked"])


class TestLoRS(MethodContract):
    method = LoRS(rank=2, alpha=3.0)
    base_kinds = ("Linear",)
    repeated = ("test_compiles",)
    test_refuses_other_kinds_of_layer = None  # they are in the classes below, which are slow


@pytest.mark.slow
class TestLoRSOnEveryKind(MethodContract):
    method = LoRS(rank=2, alpha=3.0)


@pytest.mark.slow
class TestUnmaskedLoRSOnEveryKind(MethodContract):
    method = LoRS(rank=2, gradient="unmasked")


def two_of_four(weight):
    """Zero the two smallest of every four neighbours of a row."""
    groups = weight.detach().view(-1, 4)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(1, groups.abs().topk(2).indices, 1)
    return (groups * mask).view_as(weight)


def adapted(method, dtype=torch.float64, moved=True, dense=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).to(dtype).eval()
    if not dense:
        model[0].weight.data = two_of_four(model[0].weight)
    inject(model, method, ["0"], also_train=(), seed=0)
    adapter = model[0].adapter("default")
    if moved:
        perturb(adapter)
    return model, adapter


def data(n=5, dtype=torch.float64):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(3), dtype=dtype)


def test_exact_gradients_equal_autograd_of_the_dense_formula():
    model, adapter = adapted(LoRS(rank=3, alpha=2.0))
    W, b = model[0].base.weight.detach(), model[0].base.bias.detach()
    A, B, x = (t.detach().clone().requires_grad_() for t in (adapter.lora_A, adapter.lora_B, data()))
    own_x, s = data().requires_grad_(), 2.0 / 3**0.5
    expected = x @ ((W + s * B @ A) * (W != 0)).T + b
    expected.square().sum().backward()
    y = model.train()(own_x)
    y.square().sum().backward()
    pairs = [(y, expected), (own_x.grad, x.grad), (adapter.lora_A.grad, A.grad), (adapter.lora_B.grad, B.grad)]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
    assert adapter.scaling == pytest.approx(s)


@pytest.mark.parametrize("dense", [False, True])
def test_unmasked_gradients_equal_the_authors_formulas(dense):
    """Of the factors; that of the input is exact. With no zero in the weight all are exact."""
    model, adapter = adapted(LoRS(rank=3, alpha=2.0, gradient="unmasked"), dense=dense)
    W, A, B, X, s = (
        model[0].base.weight.detach(),
        adapter.lora_A.detach(),
        adapter.lora_B.detach(),
        data(),
        adapter.scaling,
    )
    x = data().requires_grad_()
    y = model.train()(x)
    y.square().sum().backward()
    G, D = 2 * y.detach(), (2 * y.detach()).T @ X
    torch.testing.assert_close(x.grad, G @ ((W + s * B @ A) * (W != 0)), rtol=0, atol=1e-11)
    torch.testing.assert_close(adapter.lora_B.grad, s * G.T @ (X @ A.T), rtol=0, atol=1e-11)
    torch.testing.assert_close(adapter.lora_A.grad, s * (G @ B).T @ X, rtol=0, atol=1e-11)
    exact = s * (D * (W != 0)) @ A.T
    assert torch.allclose(adapter.lora_B.grad, exact, atol=1e-11) == dense


@GRADIENTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_zero_in_training_and_in_a_merge(gradient, dtype):
    model, adapter = adapted(LoRS(rank=3, gradient=gradient), dtype, moved=False)
    weight, zeros = model[0].base.weight.detach().clone(), model[0].base.weight.detach() == 0
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (model.train()(data(dtype=dtype)) - 1).square().mean().backward()
        optimizer.step()
        now = adapter.merged_weight(weight.float())
        assert not now[zeros].any()
        assert not torch.equal(now, weight.float())
    merge(model.eval())
    assert not model[0].base.weight[zeros].any()
    assert int((model[0].base.weight.detach().view(-1, 4) != 0).sum(1).max()) == 2
    unmerge(model)
    assert torch.equal(model[0].base.weight, weight)
    merge(model, keep_original=False)
    eject(model)
    assert not model[0].weight[zeros].any()


@GRADIENTS
def test_it_keeps_less_for_backward_than_lora(gradient):
    """LoRA keeps its factors in the input's dtype and what lies between them; nothing here is as large as a weight."""
    kept = []
    for method in (LoRA(rank=4), LoRS(rank=4, gradient=gradient)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
        inject(model, method, ["0", "1"], also_train=())
        kept.append(kept_bytes(model, torch.randn(5, 64, dtype=torch.bfloat16)))
    assert kept[1] <= kept[0]
    assert kept[1] < 64 * 64 * 2  # bytes of one weight
    if gradient == "exact":
        assert kept[1] == 2 * 5 * 64 * 2  # the outputs of both layers


def test_a_cascade_folds_into_the_places_that_are_not_zero():
    model, adapter = adapted(LoRS(rank=3))
    W, zeros, x = model[0].base.weight.detach().clone(), model[0].base.weight.detach() == 0, data()
    before = model(x)
    model[0].set_folded("default", DenseUpdate(model[0].base_layer))
    model[0].fold("default")
    adapter.reset(torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert not model[0].base.weight[zeros].any()
    perturb(adapter, seed=5)
    assert not model[0].applied_weight(torch.float64)[zeros].any()
    ll.set_active(model, [])
    assert torch.equal(model[0].base.weight, W)


def test_noise_that_would_fill_zeros_is_refused():
    model, _ = adapted(LoRS(rank=3))
    with pytest.raises(AdapterStateError, match=r"LoRSAdapter\) keeps the zeros of the weight, which noise would fill"):
        model[0].set_noise(Noise(seed=0, stage=0, path="0", scale=0.1))
    ll.set_active(model, [])
    model[0].set_noise(None)


def test_an_export_of_a_2_to_4_model_is_2_to_4_again(tmp_path):
    """Loaded by transformers alone, in the base's data type."""
    model = tiny_encoder().bfloat16()
    for layer in model.bert.encoder.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = two_of_four(layer.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject(model, LoRS(rank=2), seed=0)
    for adapter in adapters_named(model, "default").values():
        perturb(adapter)
    ll.export(model, tmp_path / "out", format="merged")
    after = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    for name in changed:
        assert torch.equal(after[name] == 0, before[name] == 0)


# -- the start ---------------------------------------------------------------------------------------------------------


def gradient_of(model, batches):
    """Mean of dL/dW by hand, of the loss below."""
    W, b = (t.detach().clone().requires_grad_() for t in (model[0].weight, model[0].bias))
    torch.stack([(x @ W.T + b - 1).square().mean() for x in batches]).mean().backward()
    return W.grad


@pytest.mark.parametrize("method", [LoRS(rank=2, init=LoRSGradient(batches=2, gamma=4.0)), LoRA(rank=2)])
def test_the_start_spans_leading_directions_of_the_gradient_and_changes_nothing(method):
    method = type(method)(rank=2, init=LoRSGradient(batches=2, gamma=4.0))
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(8, 6)).double(), [data(7), data(9) + 0.5]
    model[0].weight.data = two_of_four(model[0].weight)
    G, before = gradient_of(model, batches), copy.deepcopy(model)(data())
    probe = Probe(batches, lambda model, x: (model(x) - 1).square().mean())
    inject(model, method, ["0"], also_train=(), seed=0, probe=probe)
    adapter = model[0].adapter("default")
    A, V = adapter.lora_A.detach(), torch.linalg.svd(G).Vh[:2]
    torch.testing.assert_close(A @ A.T, torch.eye(2, dtype=A.dtype) / 16, rtol=0, atol=1e-12)
    torch.testing.assert_close(16 * A.T @ A, V.T @ V, rtol=0, atol=1e-10)
    assert not adapter.lora_B.any()
    assert adapter.start_A is None
    assert torch.equal(model(data()), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRS(rank=0), r"LoRS.rank is 0; it must be at least 1"),
        (lambda: LoRS(dropout=0.1), r"LoRS.dropout is 0.1; it must be 0: the update is added to the weight"),
        (lambda: LoRS(gradient="exat"), r'LoRS.gradient is "exat". Did you mean "exact"\?'),
        (lambda: LoRSGradient(batches=0), r"LoRSGradient.batches is 0; it must be at least 1"),
        (lambda: LoRSGradient(gamma=0.0), r"LoRSGradient.gamma is 0.0; it must be above 0"),
    ],
)
def test_settings_outside_their_rules(make, message):
    with pytest.raises(SettingsError, match=message):
        make()
