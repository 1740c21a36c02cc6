"""RAC-LoRA: the contract, and a stage as a step in a random subspace."""

from __future__ import annotations

import pytest
import torch
from staged_projects import staged
from torch import nn

import lora_lightning as ll
from ll_lora import LoRA
from ll_mora import MoRA
from ll_rac_lora import RACLoRA
from lora_lightning.adapters.base import write_values
from lora_lightning.adapters.folded import FactoredUpdate
from lora_lightning.errors import SettingsError
from lora_lightning.testing import MethodContract


@pytest.mark.slow  # the adapters of TestLoRA, one side of which is frozen
class TestRACLoRA(MethodContract):
    method = RACLoRA(inner=LoRA(rank=2, alpha=4.0), stage_steps=2)
    repeated = ("test_compiles",)


@pytest.mark.slow
class TestRACLoRAWithFrozenB(MethodContract):
    method = RACLoRA(inner=LoRA(rank=2, alpha=4.0), frozen="B", stage_steps=2)
    repeated = ("test_compiles",)


def layer_of(frozen, rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    ll.inject(model, RACLoRA(inner=LoRA(rank=rank, alpha=rank), frozen=frozen), ["0"], also_train=(), seed=0)
    return model, model[0], model[0].adapter("default")


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("frozen", ["A", "B"])
def test_one_gradient_step_of_a_stage_is_a_step_in_its_subspace(frozen, rank):
    """W - eta B B' G or W - eta G A' A for orthonormal factors; of full rank B, gradient descent on W itself."""
    model, layer, adapter = layer_of(frozen, rank)
    factor = getattr(adapter, f"lora_{frozen}")
    Q = torch.linalg.qr(factor if frozen == "B" else factor.mT).Q
    write_values(factor, Q if frozen == "B" else Q.mT)
    layer.set_folded("default", FactoredUpdate(layer.base_layer))
    generator, eta = torch.Generator().manual_seed(1), 0.1
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (6, 5))
    start = layer.original_weight().detach().clone()
    W = start.clone().requires_grad_()
    (nn.functional.linear(x, W) - y).square().mean().backward()
    (model(x) - y).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=eta).step()
    layer.fold("default")
    adapter.reset(torch.Generator().manual_seed(2))
    H = Q @ Q.mT
    expected = start - eta * (H @ W.grad if frozen == "B" else W.grad @ H)
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=1e-12)
    if frozen == "B" and rank == 5:
        torch.testing.assert_close(layer.weight, start - eta * W.grad, rtol=0, atol=1e-12)


def test_projections_average_to_r_over_d():
    """H = H' = H^2 and E[H] = r / d I, of the factors as they are drawn."""
    _, _, adapter = layer_of("A", 2)
    total, draws = torch.zeros(6, 6, dtype=torch.float64), 400
    generator = torch.Generator().manual_seed(3)
    for _ in range(draws):
        adapter.reset(generator)
        A = adapter.lora_A
        H = A.mT @ torch.linalg.pinv(A @ A.mT) @ A
        total += H
    torch.testing.assert_close(H, H.mT)
    torch.testing.assert_close(H, H @ H)
    # entries lie in [-1, 1], so that five standard errors are at most 5 / sqrt(draws)
    torch.testing.assert_close(total / draws, torch.eye(6, dtype=torch.float64) / 3, rtol=0, atol=5 / draws**0.5)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_the_frozen_factor_is_drawn_for_each_stage_and_stays_inside(tmp_path, frozen):
    method = RACLoRA(inner=LoRA(rank=2), frozen=frozen, stage_steps=3)
    module, before, after = staged(tmp_path, method=method, max_steps=6)
    side = 0 if frozen == "A" else 1
    for i, layer in enumerate(module.layers):
        drawn = [before.factors[step][i][side] for step in range(1, 7)]
        assert all(torch.equal(drawn[0], value) for value in drawn[:3])
        assert all(torch.equal(drawn[3], value) for value in drawn[3:])
        assert not torch.equal(drawn[0], drawn[3])
        assert not after.factors[3][i][1 - side].any()
        torch.testing.assert_close(after.weights[3][i], before.weights[3][i], rtol=0, atol=1e-12)
        (name,) = dict(layer.adapter("default").named_parameters())
        assert name == f"lora_{'B' if frozen == 'A' else 'A'}"
    again, _, _ = staged(tmp_path, method=method, max_steps=6)
    for one, other in zip(module.layers, again.layers, strict=True):
        assert torch.equal(one.weight, other.weight)


def test_what_has_no_two_factors_is_refused():
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(SettingsError, match=r"RACLoRA\.inner is MoRA, which is no plain pair of factors"):
        ll.inject(model, RACLoRA(inner=MoRA(rank=1)), ["0"], also_train=())
    with pytest.raises(SettingsError, match="there are no two factors that train, of which one could be frozen"):
        ll.inject(model, RACLoRA(inner=LoRA(rank=1, train="B")), ["0"], also_train=())
