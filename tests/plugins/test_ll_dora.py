"""DoRA: the contract, and every invariant of the paper and of our reading of it, against dense float64 references."""

from __future__ import annotations

import copy
import io
import json

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import lora_lightning as ll
from ll_dora import DoRA, functional
from lora_lightning.adapters.folded import DenseUpdate
from lora_lightning.errors import ExportError, SettingsError
from lora_lightning.exporters.peft import folder as peft_file
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge_model import merge, unmerge
from lora_lightning.injection.records import adapters_named
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.testing import DROPPING_KINDS, MethodContract, perturb, tiny_encoder

METHOD = DoRA(rank=3, alpha=6.0)
FULL = DoRA(rank=3, alpha=6.0, detach_norm=False)


class TestDoRA(MethodContract):
    method = DoRA(rank=2, alpha=4.0)


class TestDoRAWithDropout(MethodContract):
    method = DoRA(rank=2, alpha=4.0, dropout=0.3)
    base_kinds = DROPPING_KINDS
    repeated = ("test_compiles",)


@pytest.mark.slow
class TestDoRAWithFullGradient(MethodContract):
    method = DoRA(rank=2, alpha=4.0, detach_norm=False)


class TestMagnitudeAlone(MethodContract):
    method = DoRA(mode="magnitude")
    random_start = False


# -- what the tests stand on -------------------------------------------------------------------------------------------


def adapted(method=METHOD, layer=None, dtype=torch.float64, moved=True):
    """A model of one layer, its adapter, and the tensors of the equations."""
    torch.manual_seed(0)
    model = nn.Sequential(layer or nn.Linear(8, 6)).to(dtype).eval()
    inject(model, method, ["0"], also_train=(), seed=0)
    adapter = model[0].adapter("default")
    if moved:
        perturb(adapter)
    return model, adapter


def data(n=5, d_in=8, dtype=torch.float64):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(3), dtype=dtype)


def parts(adapter):
    """W, b, s, and copies of A, B, m that a reference differentiates on its own."""
    leaves = [p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B, adapter.magnitude)]
    return adapter.base.weight().detach(), adapter.base.bias.detach(), adapter.scaling, *leaves


def reference_weight(W, s, A, B, m, detach=False):
    """Equation 5, with the norm of the formed direction; equation 11 for the detached one."""
    V = W + s * (B @ A)
    n = torch.stack([row.dot(row).sqrt() for row in V])
    return (m / (n.detach() if detach else n)).unsqueeze(1) * V


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# -- start -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [METHOD, DoRA(mode="magnitude")], ids=["full", "magnitude"])
def test_1_the_start_is_exact(dtype, method):
    """c is 1 to the last bit, so the output is the base layer's own."""
    model, adapter = adapted(method, nn.Linear(48, 40), dtype, moved=False)
    with torch.no_grad():
        assert torch.equal(adapter._ratio(adapter.base), torch.ones(40))
        assert torch.equal(model(data(d_in=48, dtype=dtype)), model[0].base(data(d_in=48, dtype=dtype)))
    assert adapter.magnitude.dtype == torch.float32
    norms = model[0].base.weight.double().norm(dim=1)
    torch.testing.assert_close(adapter.magnitude.double(), norms, rtol=2e-7, atol=0)


def test_1_row_norms_do_not_depend_on_the_order_of_summation():
    weight = torch.randn(32, 500)
    norms = functional.squared_row_norms(weight)
    assert torch.equal(norms, functional.squared_row_norms(weight.mT.contiguous().mT))
    assert torch.equal(norms, functional.squared_row_norms(weight[:, torch.randperm(500)]))


def test_a_reset_starts_from_the_weight_as_it_is_now():
    model, adapter = adapted()
    rewritten = 2 * adapter.base.weight() + 1
    adapter.base.write(rewritten)
    adapter.reset(torch.Generator().manual_seed(1))
    close(adapter.magnitude.detach(), rewritten.norm(dim=1))
    assert torch.equal(model(data()), model[0].base(data()))


# -- the function ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [METHOD, FULL], ids=["detached", "full gradient"])
def test_2_forward_and_gradients_equal_a_dense_reference(method):
    model, adapter = adapted(method)
    W, b, s, A, B, m = parts(adapter)
    x, own = data().requires_grad_(), data().requires_grad_()
    target = torch.randn(5, 6, dtype=torch.float64)
    ((model(own) - target) ** 2).sum().backward()
    y = x @ reference_weight(W, s, A, B, m, method.detach_norm).T + b
    ((y - target) ** 2).sum().backward()
    close(model(own), y)
    for found, expected in ((own, x), (adapter.lora_A, A), (adapter.lora_B, B), (adapter.magnitude, m)):
        close(found.grad, expected.grad, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_2_merged_equals_unmerged(dtype, tolerance):
    model, adapter = adapted(dtype=dtype)
    x = data(dtype=dtype)
    before, weight = model(x), model[0].base.weight.clone()
    merge(model)
    close(model[0].base.weight, reference_weight(weight, *parts_of(adapter)), tolerance)
    close(model(x), before, tolerance)
    unmerge(model)
    assert torch.equal(model[0].base.weight, weight)  # 3, to the last bit


def parts_of(adapter):
    return adapter.scaling, adapter.lora_A.detach(), adapter.lora_B.detach(), adapter.magnitude.detach()


def test_4_rows_of_the_merged_weight_are_as_long_as_the_magnitude():
    _, adapter = adapted()
    with torch.no_grad():
        adapter.magnitude[0] *= -1
    merged = adapter.merged_weight(adapter.base.weight())
    close(merged.norm(dim=1), adapter.magnitude.abs())


def test_5_the_magnitude_scales_everything_but_the_bias():
    model, adapter = adapted()
    before = model(data()) - model[0].base.bias
    with torch.no_grad():
        adapter.magnitude *= 2.5
    close(model(data()) - model[0].base.bias, 2.5 * before)
    close(model(torch.zeros(1, 8, dtype=torch.float64))[0], model[0].base.bias)


def test_6_detaching_changes_only_the_gradients_of_the_factors():
    """dL/dm = <G, V> / n both ways; dL/dV = c G detached, c (G - V <G, V> / n^2) in full."""
    G = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    grads = []
    for method in (METHOD, FULL):
        _, adapter = adapted(method)
        W, _, s, A, B, m = (p.detach() for p in map(torch.as_tensor, parts(adapter)))
        V = W + s * B @ A
        n = V.norm(dim=1, keepdim=True)
        inner = (G * V).sum(1, keepdim=True)
        dV = m[:, None] / n * (G if method.detach_norm else G - V * inner / n**2)
        (adapter.merged_weight(W) * G).sum().backward()
        close(adapter.lora_B.grad, s * dV @ A.T, 1e-11)
        close(adapter.lora_A.grad, s * B.T @ dV, 1e-11)
        close(adapter.magnitude.grad, (inner / n)[:, 0], 1e-11)
        grads.append(adapter.lora_A.grad)
    assert not torch.allclose(*grads)


def test_7_the_full_gradient_has_no_component_along_a_row():
    _, adapter = adapted()
    W, _, s, A, B, m = parts(adapter)
    W.requires_grad_()  # dL/dW is dL/dV
    c = functional.decomposed_ratio(W, functional.squared_row_norms(W), A, B, m, s, detach_norm=False)
    functional.decomposed_weight(W, A, B, c, s).pow(3).sum().backward()
    V = W + s * B @ A
    assert W.grad.norm() > 0.1
    close((W.grad * V).sum(1), torch.zeros(6, dtype=torch.float64), 1e-11)


@pytest.mark.parametrize("method", [METHOD, FULL], ids=["detached", "full gradient"])
def test_8_first_gradients(method):
    model, adapter = adapted(method, moved=False)
    model(data()).square().sum().backward()
    assert not adapter.lora_A.grad.any()
    assert adapter.lora_B.grad.any()
    assert adapter.magnitude.grad.any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_9_norms_without_the_product(dtype, tolerance):
    W, A, B = torch.randn(30, 50, dtype=dtype), torch.randn(4, 50, dtype=dtype), torch.randn(30, 4, dtype=dtype)
    squares = functional.squared_direction_norms(W, functional.squared_row_norms(W), A, B, 0.7)
    torch.testing.assert_close(squares.sqrt(), (W + 0.7 * B @ A).norm(dim=1), rtol=tolerance, atol=0)


@pytest.mark.parametrize("method", [METHOD, FULL], ids=["detached", "full gradient"])
def test_no_tensor_of_the_size_of_the_weight_is_made(method):
    """The claim behind 9: in a step after the first, forward and backward make no second (d_out, d_in) tensor."""
    model, adapter = adapted(method, nn.Linear(13, 7))
    x = data(d_in=13).requires_grad_()
    model(x).sum().backward()
    known = model[0].base.weight.data_ptr()
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() == 91 and out.data_ptr() != known:
                seen.append(func)
            return out

    with Watch():
        model.train()(x).sum().backward()
    assert not seen
    with Watch():
        adapter.merged_weight(model[0].base.weight)
    assert seen  # it would be noticed


@pytest.mark.parametrize("method", [METHOD, FULL, DoRA(rank=3, dropout=0.25)], ids=["detached", "full", "dropout"])
def test_backward_keeps_one_more_tensor_of_the_size_of_the_output(method):
    """The card's cost: beside the input, and the bytes of dropout's mask, all else is of the size of the factors."""
    model, _ = adapted(method, nn.Linear(40, 48), torch.float32)
    x = data(100, 40, torch.float32).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in [x, *model.state_dict().values()]}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(x)
    output, mask, factors = 100 * 48 * 4, 100 * 40 + 8, 3 * (40 + 48 + 100) * 4
    assert sum(size == output for size in sizes.values()) == 1
    assert sum(sizes.values()) <= output + mask * bool(method.dropout) + 4 * factors


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_10_dropout_is_exact(monkeypatch):
    """One mask for both adapted terms, none for the base term, and neither touches the bias; gradients too."""
    model, adapter = adapted(DoRA(rank=3, alpha=6.0, dropout=0.25))
    W, b, s, A, B, m = parts(adapter)
    mask = (torch.rand(5, 8, generator=torch.Generator().manual_seed(1)) < 0.75).to(torch.uint8)
    monkeypatch.setattr(functional, "keep_mask", lambda x, p: mask)
    own, x = data().requires_grad_(), data().requires_grad_()
    y = model.train()(own)
    V = W + s * B @ A
    c = m / V.detach().norm(dim=1)
    dropped = x * mask / 0.75
    expected = b + x @ W.T + (c - 1) * (dropped @ W.T) + c * s * (dropped @ A.T @ B.T)
    close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for found, wanted in ((own, x), (adapter.lora_A, A), (adapter.lora_B, B), (adapter.magnitude, m)):
        close(found.grad, wanted.grad, 1e-10)


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Conv1d(8, 6, 3, groups=2, dilation=2)], ids=["Linear", "Conv1d"])
def test_10_without_dropped_entries_it_is_the_evaluated_output(monkeypatch, layer):
    model, _ = adapted(DoRA(rank=3, alpha=6.0, dropout=0.25), copy.deepcopy(layer))
    plain, _ = adapted(METHOD, copy.deepcopy(layer))
    x = torch.randn(2, 8, 9, dtype=torch.float64) if isinstance(layer, nn.Conv1d) else data()
    assert torch.equal(model(x), plain(x))  # p has no effect in evaluation
    assert not torch.allclose(model.train()(x), plain(x))
    bias = model(torch.zeros_like(x)).flatten(1)[:, :1]
    close(bias, layer.bias.detach().double()[:1].expand(len(x), 1))
    monkeypatch.setattr(functional, "keep_mask", lambda x, p: torch.full_like(x, 1 - p))
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p: x)
    close(model(x), plain(x))


# -- further identities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [METHOD, DoRA(mode="magnitude")], ids=["full", "magnitude"])
def test_11_scaling_the_start_magnitude_scales_the_product(method):
    """B = 0 and m = k |W_j|; in magnitude mode this is the whole method."""
    model, adapter = adapted(method, moved=False)
    with torch.no_grad():
        adapter.magnitude *= 0.3
    bias = model[0].base.bias
    close(model(data()) - bias, 0.3 * (model[0].base(data()) - bias))


def test_12_no_gradient_reaches_the_base():
    model, _ = adapted(FULL)
    model(data()).sum().backward()
    assert model[0].base.weight.grad is None
    assert model[0].base.bias.grad is None


@pytest.mark.parametrize(
    "method", [METHOD, FULL, DoRA(mode="magnitude"), DoRA(rank=3, dropout=0.5)], ids=["detached", "full", "m", "drop"]
)
def test_13_a_zero_row_is_safe(method):
    layer = nn.Linear(8, 6)
    with torch.no_grad():
        layer.weight[2] = 0
    model, adapter = adapted(method, layer, moved=False)
    model.train()
    assert torch.equal(model(data()), model[0].base(data()))
    optimizer = build_optimizer(model, lambda groups: torch.optim.Adam(groups, lr=0.05))
    for _ in range(4):
        optimizer.zero_grad()
        y = model(data())
        (y - 1).square().sum().backward()
        assert torch.isfinite(y).all()
        assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())
        optimizer.step()
    moved = adapter.merged_weight(adapter.base.weight())[2].norm()
    assert moved > 0.01 or method.mode == "magnitude"  # its factors give it a direction, and it learns a length
    assert adapter.zero_rows() == 1
    assert method.report(adapters_named(model, "default"))["zero_rows"] == 1


def test_14_a_transposed_layer_is_its_linear_twin():
    linear, twin = nn.Linear(6, 6), Conv1D(6, 6)  # square, so that a missing transpose shows in numbers only
    with torch.no_grad():
        twin.weight.copy_(linear.weight.T)
        twin.bias.copy_(linear.bias)
    x, outputs = data(d_in=6), []
    for layer in (linear, twin):
        model, _ = adapted(layer=layer)
        applied = model(x)
        merge(model)
        outputs.append((applied, model(x), model[0].base.weight.clone()))
        unmerge(model)
    close(outputs[0][0], outputs[1][0])
    close(outputs[0][1], outputs[1][1])
    close(outputs[0][2], outputs[1][2].T)
    assert torch.equal(linear.weight, twin.weight.T)


def _conv_reference(layer, adapter, x):
    """Each group's kernels from its own rows of B and the shared A, normalised and scaled one by one."""
    delta = (adapter.lora_B @ adapter.lora_A).reshape(layer.weight.shape) * adapter.scaling
    kernels = torch.stack([m * V / V.norm() for m, V in zip(adapter.magnitude, layer.weight + delta, strict=True)])
    return nn.functional.conv2d(x, kernels, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_equal_a_dense_reference(groups):
    model, adapter = adapted(layer=nn.Conv2d(4, 6, 3, padding=2, dilation=2, stride=(2, 1), groups=groups))
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    close(model(x), _conv_reference(model[0].base, adapter, x))


def test_an_embedding_has_one_magnitude_for_each_dimension():
    model, adapter = adapted(layer=nn.Embedding(11, 5))
    ids = torch.tensor([[1, 4, 10], [0, 4, 4]])
    columns = (model[0].base.weight + adapter.scaling * (adapter.lora_B @ adapter.lora_A).T).T
    table = torch.stack([m * v / v.norm() for m, v in zip(adapter.magnitude, columns, strict=True)]).T
    close(model(ids), table[ids])


def test_outputs_and_gradients_equal_pefts():
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(8, 6))
    model = copy.deepcopy(theirs)
    inject(model, METHOD, ["0"], also_train=())
    adapter = model[0].adapter("default")
    perturb(adapter)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(theirs, config)
    names = {"lora_A.default.weight": "lora_A", "lora_B.default.weight": "lora_B"}
    names["lora_magnitude_vector.default.weight"] = "magnitude"
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        for name, own in names.items():
            layer.get_parameter(name).copy_(getattr(adapter, own))
    x = data(dtype=torch.float32)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    for each in (model, theirs):
        each(x).square().sum().backward()
    for name, own in names.items():
        torch.testing.assert_close(getattr(adapter, own).grad, layer.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_the_ratio_in_float32():
    model, adapter = adapted(dtype=torch.float32)
    x = data(dtype=torch.float32)
    with torch.no_grad():
        exact = adapter._ratio(adapter.base)
        adapter._eval_ratio = None
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(adapter._ratio(adapter.base), exact)
            assert model(x).dtype == torch.bfloat16
            merged = adapter.merged_weight(adapter.base.weight())
        assert torch.equal(merged, adapter.merged_weight(adapter.base.weight()))


@pytest.mark.parametrize("method", [METHOD, FULL, DoRA(mode="magnitude")], ids=["detached", "full", "magnitude"])
@pytest.mark.parametrize("mode", ["autocast", "bfloat16 base"])
def test_half_precision_gradients_are_near_the_exact_ones_and_float32(method, mode):
    found = []
    for half in (False, True):
        model, adapter = adapted(method, nn.Linear(48, 40), torch.bfloat16 if mode != "autocast" else torch.float32)
        if not half and mode != "autocast":
            exact = copy.deepcopy(model[0].base).float()
            model, adapter = adapted(method, exact, torch.float32)
        x = data(d_in=48, dtype=model[0].base.weight.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=half and mode == "autocast"):
            y = model.train()(x)
        y.float().square().sum().backward()
        found.append([p.grad for p in adapter.parameters()])
    for exact, half in zip(*found, strict=True):
        assert half.dtype == torch.float32
        assert float((half - exact).norm() / exact.norm()) < 0.03


# -- state and caches --------------------------------------------------------------------------------------------------


def test_16_state_is_three_tensors_and_reproduces_outputs():
    model, adapter = adapted()
    with torch.no_grad():
        before = model(data())  # fills the caches
    assert set(adapter.state_dict()) == {"lora_A", "lora_B", "magnitude"}
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh, other = adapted()
    perturb(other, seed=4)
    with torch.no_grad():
        fresh(data())
        fresh.load_state_dict(torch.load(file))
        assert torch.equal(fresh(data()), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_16_the_cached_ratio_is_never_stale(mode, optimizer):
    model, adapter = adapted()
    steps = optimizer(adapter.parameters(), lr=0.1)
    for _ in range(3):
        with mode():
            evaluated = model.eval()(data())
            assert torch.equal(model(data()), evaluated)
        close(evaluated, (data() @ reference_weight(*weights(model)).T + model[0].base.bias).detach())
        steps.zero_grad()
        model.train()(data()).square().sum().backward()
        steps.step()


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "magnitude", "weight"])
def test_16_a_write_between_two_evaluations_is_seen(name):
    """By an optimizer, or into the base, with no training pass between."""
    model, adapter = adapted()
    with torch.no_grad():
        before = model(data())
    if name == "weight":
        adapter.base.write(3 * adapter.base.weight() + 1)
    else:
        parameter = getattr(adapter, name)
        parameter.grad = torch.randn_like(parameter)
        torch.optim.Adam([parameter], lr=0.1).step()
    with torch.no_grad():
        after = model(data())
    assert not torch.allclose(before, after)
    close(after, data() @ reference_weight(*weights(model)).T + model[0].base.bias.detach())


def weights(model):
    adapter = model[0].adapter("default")
    return model[0].base.weight, *parts_of(adapter)


def test_16_the_cached_ratio_saves_the_norm_and_a_training_pass_drops_it(monkeypatch):
    model, adapter = adapted()
    calls = []
    original = functional.squared_direction_norms
    monkeypatch.setattr(functional, "squared_direction_norms", lambda *a: calls.append(1) or original(*a))
    with torch.no_grad():
        model(data())
        model(data())
    assert len(calls) == 1
    model.train()(data())
    assert adapter._eval_ratio is None
    adapter.magnitude.data.copy_(2 * adapter.magnitude)  # a write that no version counter sees
    with torch.no_grad():
        close(model.eval()(data()), data() @ reference_weight(*weights(model)).T + model[0].base.bias)


def test_training_works_after_an_evaluation_in_inference_mode():
    for method in (METHOD, FULL, DoRA(mode="magnitude")):
        model, adapter = adapted(method)
        with torch.inference_mode():
            model(data())
        for training in (True, False):  # evaluation with gradients, too
            model.train(training)(data()).sum().backward()
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
        with torch.inference_mode():
            model.eval()(data())
        x = data().requires_grad_()
        model(x).sum().backward()
        assert x.grad.any()


# -- settings ----------------------------------------------------------------------------------------------------------


def test_groups_have_no_decay_on_magnitudes():
    model, adapter = adapted()
    groups = METHOD.param_groups(adapters_named(model, "default"))
    assert set(groups) == {"A", "B", "magnitude"}
    assert groups["magnitude"].params == [adapter.magnitude]
    assert groups["magnitude"].weight_decay == 0.0
    optimizer = build_optimizer(model, lambda groups: torch.optim.AdamW(groups, weight_decay=0.1))
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups}["magnitude"] == 0.0
    alone, _ = adapted(DoRA(mode="magnitude"))
    assert set(DoRA(mode="magnitude").param_groups(adapters_named(alone, "default"))) == {"magnitude"}


def test_trained_numbers():
    """r (d_in + d_out) + d_out, and d_out where the magnitude trains alone."""
    assert sum(p.numel() for p in adapted()[1].parameters()) == 3 * (8 + 6) + 6
    assert sum(p.numel() for p in adapted(DoRA(mode="magnitude"))[1].parameters()) == 6


def test_scaling_rules():
    assert DoRA(rank=16, alpha=32.0).scaling == 2.0
    assert DoRA(rank=16, alpha=32.0, scaling_rule="alpha/sqrt(r)").scaling == 8.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"DoRA.rank is 0; it must be at least 1"),
        ({"alpha": -1.0}, r"DoRA.alpha is -1.0; it must be above 0"),
        ({"dropout": 1.0}, r"DoRA.dropout is 1.0; it must lie in \[0, 1\)"),
        ({"mode": "magnitud"}, r'DoRA.mode is "magnitud". Did you mean "magnitude"\?'),
        ({"mode": "magnitude", "dropout": 0.1}, r'DoRA.dropout is 0.1; it must be 0 where mode is "magnitude"'),
        ({"detach_norm": "no"}, r"DoRA.detach_norm is 'no'; it must be true or false"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        DoRA(**settings)


# -- export ------------------------------------------------------------------------------------------------------------


def encoder(method, **options):
    model = tiny_encoder()
    ll.inject(model, method, ["query"], seed=0, **options)
    for adapter in adapters_named(model, "default").values():
        perturb(adapter, size=0.1)
    return model


TOKENS = torch.tensor([[1, 5, 7, 2]])


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_it_travels_native_merged_or_truncated(tmp_path):
    model = encoder(METHOD)
    assert ll.export(model, tmp_path / "native", rank=3).kind == "native"
    again = tiny_encoder()
    ll.import_peft(again, tmp_path / "native")
    assert torch.equal(logits(again), logits(model))
    report = ll.export(model, tmp_path / "truncated", rank=2)
    assert report.kind == "truncated SVD"
    assert 0 < max(report.discarded.values()) < 1
    assert "use_dora" not in json.loads((tmp_path / "truncated" / "adapter_config.json").read_text())
    ll.export(model, tmp_path / "merged", format="merged")
    plain = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-6)


def test_a_magnitude_damaged_on_the_disk_is_found(tmp_path, monkeypatch):
    real = peft_file.read

    def damaged(folder, stacks):
        found = real(folder, stacks)
        next(iter(found.layers.values())).extra[peft_file.MAGNITUDE][1] += 1e-3
        return found

    monkeypatch.setattr(peft_file, "read", damaged)
    with pytest.raises(ExportError, match="the files give an update that differs by"):
        ll.export(encoder(METHOD), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def folded():
    """One that a cascade of stages has folded once."""
    model = encoder(METHOD)
    for _, layer in ll.iter_adapters(model):
        layer.set_folded("default", DenseUpdate(layer.base_layer))
        layer.fold("default")
    return model


def with_a_zero_row():
    model = encoder(METHOD)
    layer = next(layer for _, layer in ll.iter_adapters(model))
    with torch.no_grad():
        layer.base.weight[2] = 0
        layer.adapter("default").lora_B[2] = 0
    return model


@pytest.mark.parametrize(
    ("build", "path", "reason"),
    [
        (lambda: encoder(DoRA(mode="magnitude")), "", "peft's use_dora needs a factor pair on every layer"),
        (lambda: encoder(METHOD, overrides={"layer.1": {"mode": "magnitude"}}), r"layer\.1", "peft's use_dora needs"),
        (folded, "", "peft's use_dora has no place for the updates of earlier stages"),
        (with_a_zero_row, r"layer\.0", "a row of its weight is zero, and peft divides by the length of each"),
    ],
    ids=["magnitude", "magnitude on one layer", "folded", "zero row"],
)
def test_what_pefts_format_cannot_say_travels_otherwise(build, path, reason, tmp_path):
    model = build()
    message = f"DoRA on .*{path}.*query has no exact low-rank form: {reason}"
    with pytest.raises(ExportError, match=message) as caught:
        ll.export(model, tmp_path / "out")
    assert "Give rank=N for a truncated SVD" in str(caught.value)
    assert not list(tmp_path.iterdir())
    report = ll.export(model, tmp_path / "out", rank=64)  # more than the layers have
    assert report.kind in ("exact LoRA", "truncated SVD")
    assert all(share < 1e-12 for share in report.discarded.values())
    again = tiny_encoder()
    again.load_state_dict({**again.state_dict(), **base_state(model)})
    assert type(ll.import_peft(again, tmp_path / "out").method).__name__ == "LoRA"
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    assert ll.export(model, tmp_path / "out", format="merged").kind == "merged"
    assert ll.export(model, tmp_path / "out", format="delta").kind == "dense update"


def base_state(model):
    """Original weights of the adapted layers by their plain names."""
    return {f"{path}.weight": layer.original_weight().detach() for path, layer in ll.iter_adapters(model)}


def test_a_grouped_convolution_stays_here(tmp_path):
    model, _ = adapted(layer=nn.Conv2d(4, 6, 3, groups=2), dtype=torch.float32)
    with pytest.raises(
        ExportError, match="peft's use_dora takes the lengths of other rows on a convolution of several groups"
    ):
        ll.export(model, tmp_path / "out")
    assert ll.export(model, tmp_path / "out", format="delta").difference == 0.0
