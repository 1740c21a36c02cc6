from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.errors import SettingsError
from lora_lightning.injection.records import adapters_named
from lora_lightning.plugins import registry
from lora_lightning.testing import DROPPING_KINDS, MethodContract, TinyMLP, perturb, tiny_encoder

TOKENS = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0]])


class TestLoRA(MethodContract):
    method = LoRA(rank=2, alpha=4.0)


class TestLoRAWithDropout(MethodContract):
    method = LoRA(rank=2, alpha=4.0, dropout=0.4)
    base_kinds = DROPPING_KINDS  # token ids cannot be dropped
    repeated = ("test_compiles",)


@pytest.mark.slow
class TestLoRAWithBias(MethodContract):
    method = LoRA(rank=2, alpha=4.0, bias=True)
    base_kinds = DROPPING_KINDS  # it has no bias to add to
    repeated = ("test_compiles",)


@pytest.mark.slow  # the mirror of the next
class TestLoRATrainsA(MethodContract):
    method = LoRA(rank=2, alpha=4.0, train="A")


class TestLoRATrainsB(MethodContract):
    method = LoRA(rank=2, alpha=4.0, train="B", start="gaussian")
    repeated = ("test_compiles",)


@pytest.mark.slow
class TestLoRAInCheapestOrder(MethodContract):
    method = LoRA(rank=2, alpha=4.0, order="flops")


@pytest.mark.slow
class TestRsLoRA(MethodContract):
    method = LoRA(rank=2, alpha=4.0, scaling_rule="alpha/sqrt(r)")


def adapted(method: LoRA, seed: int = 0) -> tuple[TinyMLP, torch.Tensor]:
    model = TinyMLP().double()
    ll.inject(model, method, seed=seed)
    return model, torch.randn(16, 6, dtype=torch.float64)


# -- LoRA, arXiv:2106.09685 --------------------------------------------------------------------------------------------


def test_provided_by_its_plugin() -> None:
    assert ll.method("LoRA") is LoRA
    assert registry().providers["LoRA"].plugin == "ll_lora"


def test_logits_start_at_the_base_models() -> None:
    model = tiny_encoder()
    ll.inject(model, LoRA(), also_train=())
    assert torch.equal(model(TOKENS).logits, tiny_encoder()(TOKENS).logits)


def test_first_gradient_reaches_b_alone() -> None:
    model, x = adapted(LoRA(rank=2))
    model(x).square().sum().backward()
    for adapter in adapters_named(model, "default").values():
        pair = adapter.factor_pairs()[0]
        assert pair.lora_A.grad is not None
        assert not pair.lora_A.grad.any()
        assert pair.lora_B.grad is not None
        assert pair.lora_B.grad.any()


def test_update_is_s_b_a_of_rank_r_and_the_base_does_not_move() -> None:
    model, x = adapted(LoRA(rank=2, alpha=5.0))
    before = {name: p.clone() for name, p in model.named_parameters() if ".base." in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if ".base." in name)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".base." in name)
    layer = model.first
    pair = layer.adapter("default").factor_pairs()[0]
    update = layer.adapter("default").merged_weight(layer.base.weight) - layer.base.weight
    torch.testing.assert_close(update, 5.0 / 2 * pair.lora_B @ pair.lora_A)
    assert int(torch.linalg.matrix_rank(update)) == 2
    hidden = x @ (before["first.base.weight"] + update).T + before["first.base.bias"]
    torch.testing.assert_close(layer(x), hidden)


@pytest.mark.parametrize("rank", [1, 3])
def test_state_is_r_times_in_plus_out_numbers_a_layer(rank: int) -> None:
    model, _ = adapted(LoRA(rank=rank))
    sizes = {
        path: sum(tensor.numel() for tensor in adapter.state_dict().values() if tensor.is_floating_point())
        for path, adapter in adapters_named(model, "default").items()
    }
    assert sizes == {"first": rank * (6 + 8), "second": rank * (8 + 4)}


def test_merge_changes_the_weight_by_the_scaled_product() -> None:
    model, x = adapted(LoRA(rank=2, alpha=6.0))
    for adapter in adapters_named(model, "default").values():
        perturb(adapter)
    pair = model.first.adapter("default").factor_pairs()[0]
    expected = model.first.base.weight + 3.0 * pair.lora_B @ pair.lora_A
    before = model(x)
    ll.merge(model)
    torch.testing.assert_close(model.first.base.weight, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(model(x), before)


def test_pruned_components_stay_out_of_the_update() -> None:
    model, _ = adapted(LoRA(rank=3))
    for adapter in adapters_named(model, "default").values():
        perturb(adapter)
    adapter = model.second.adapter("default")
    adapter.rank_mask[1] = False
    kept = [0, 2]
    pair = adapter.factor_pairs()[0]
    expected = model.second.base.weight + pair.scaling * pair.lora_B[:, kept] @ pair.lora_A[kept]
    torch.testing.assert_close(adapter.merged_weight(model.second.base.weight), expected)
    hidden = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(model.second(hidden), hidden @ expected.T + model.second.base.bias)


# -- rsLoRA, arXiv:2312.03732 ------------------------------------------------------------------------------------------


def test_scaling_rules() -> None:
    assert LoRA(rank=8, alpha=16.0).scaling == 2.0
    assert LoRA(rank=16, alpha=16.0, scaling_rule="alpha/sqrt(r)").scaling == 4.0
    products = [
        LoRA(rank=rank, alpha=3.0, scaling_rule="alpha/sqrt(r)").scaling * math.sqrt(rank) for rank in (1, 2, 5, 64)
    ]
    assert products == pytest.approx([3.0] * 4, rel=1e-15)


def test_rslora_is_lora_with_alpha_times_sqrt_r() -> None:
    rank = 4
    first, x = adapted(LoRA(rank=rank, alpha=3.0, scaling_rule="alpha/sqrt(r)"), seed=1)
    second, _ = adapted(LoRA(rank=rank, alpha=3.0 * math.sqrt(rank)), seed=1)
    for model in (first, second):
        for adapter in adapters_named(model, "default").values():
            perturb(adapter)
    assert torch.equal(first(x), second(x))


def test_overrides_change_the_scaling_of_their_layers() -> None:
    model = TinyMLP()
    rule = LoRA(rank=2, alpha=4.0, scaling_rule="alpha/sqrt(r)")
    ll.inject(model, rule, overrides={"second": {"rank": 4}})
    scalings = {path: a.factor_pairs()[0].scaling for path, a in adapters_named(model, "default").items()}
    assert scalings == pytest.approx({"first": 4 / math.sqrt(2), "second": 2.0})


def output_after_one_step(rank: int, rule: str) -> float:
    """Norm of the adapter's output on the batch of its first SGD step."""
    layer = nn.Sequential(nn.Linear(512, 64, bias=False))
    ll.inject(layer, LoRA(rank=rank, alpha=16.0, scaling_rule=rule), ["0"], seed=3)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    x, target = torch.randn(8, 512, generator=generator), torch.randn(8, 64, generator=generator)
    start = layer(x).detach()
    (layer(x) * target).sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter -= 1e-5 * parameter.grad
    return float((layer(x) - start).detach().norm())


def test_first_update_does_not_depend_on_rank_with_rslora_and_falls_with_lora() -> None:
    ranks = (16, 64)
    rs = [output_after_one_step(rank, "alpha/sqrt(r)") for rank in ranks]
    plain = [output_after_one_step(rank, "alpha/r") for rank in ranks]
    assert rs[1] / rs[0] == pytest.approx(1.0, rel=0.35)
    assert plain[1] / plain[0] == pytest.approx(1 / 4, rel=0.35)


# -- one frozen side: FFA-LoRA's layer, arXiv:2403.12313 ---------------------------------------------------------------


def trained(method: LoRA, lr: float, data_seed: int = 0, steps: int = 4) -> TinyMLP:
    model, _ = adapted(method)
    generator = torch.Generator().manual_seed(data_seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    return model


def test_the_frozen_side_is_the_same_on_all_clients_and_after_training() -> None:
    start, _ = adapted(LoRA(rank=2, train="B"))
    clients = [trained(LoRA(rank=2, train="B"), lr=0.1, data_seed=seed) for seed in (1, 2)]
    for client in clients:
        for path, adapter in adapters_named(client, "default").items():
            other = adapters_named(start, "default")[path]
            assert torch.equal(adapter.factor_pairs()[0].lora_A, other.factor_pairs()[0].lora_A)
            assert not torch.equal(adapter.factor_pairs()[0].lora_B, other.factor_pairs()[0].lora_B)


@pytest.mark.parametrize(("train", "exact"), [("B", True), ("both", False)])
def test_averaging_b_averages_the_models_only_where_a_is_frozen(train: str, exact: bool) -> None:
    clients = [trained(LoRA(rank=2, train=train), lr=0.3, data_seed=seed) for seed in (1, 2)]  # type: ignore[arg-type]
    layers = [client.first for client in clients]
    merged = [layer.adapter("default").merged_weight(layer.base.weight) for layer in layers]
    average, _ = adapted(LoRA(rank=2, train=train))  # type: ignore[arg-type]
    server = average.first.adapter("default")
    with torch.no_grad():
        for side in ("lora_A", "lora_B"):
            values = [getattr(layer.adapter("default"), side) for layer in layers]
            getattr(server, side).copy_((values[0] + values[1]) / 2)
    error = float((server.merged_weight(average.first.base.weight) - (merged[0] + merged[1]) / 2).abs().max().detach())
    assert (error < 1e-12) == exact


def test_alpha_and_rate_trade_off_under_sgd() -> None:
    """From B = 0 with A frozen, (alpha, lr) and (2 alpha, lr / 4) walk the same path of updates."""
    first = trained(LoRA(rank=2, alpha=2.0, train="B"), lr=0.2)
    second = trained(LoRA(rank=2, alpha=4.0, train="B"), lr=0.05)
    for path, adapter in adapters_named(first, "default").items():
        other = adapters_named(second, "default")[path]
        weight = first.get_submodule(path).base.weight
        torch.testing.assert_close(adapter.merged_weight(weight), other.merged_weight(weight), rtol=1e-12, atol=1e-12)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, r"LoRA.rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, r"LoRA.alpha is 0.0; it must be above 0"),
        ({"dropout": 1.0}, r"LoRA.dropout is 1.0; it must lie in \[0, 1\)"),
        ({"dropout": -0.1}, r"LoRA.dropout is -0.1; it must lie in \[0, 1\)"),
    ],
)
def test_values_outside_their_rule(fields: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        LoRA(**fields)  # type: ignore[arg-type]
