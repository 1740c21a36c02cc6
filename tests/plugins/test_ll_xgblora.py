"""XGBLoRA: the contract, and rounds of boosting; layers that rest are tested with the cascade."""

from __future__ import annotations

import pytest
import torch
from staged_projects import staged
from torch import nn

import lora_lightning as ll
from ll_cola import COLA
from ll_lora import LoRA
from ll_xgblora import XGBLoRA
from lora_lightning.callbacks import Cascade
from lora_lightning.errors import SettingsError
from lora_lightning.injection.records import adapters_named
from lora_lightning.testing import MethodContract, perturb


@pytest.mark.slow  # the adapters of TestLoRA
class TestXGBLoRA(MethodContract):
    method = XGBLoRA(inner=LoRA(rank=1, alpha=1.0), active_layers=1, stage_steps=2)
    repeated = ("test_compiles",)


def test_its_cascade():
    (cascade,) = XGBLoRA(inner=LoRA(rank=1), stage_steps=10).callbacks()
    assert isinstance(cascade, Cascade)
    assert (cascade.active_layers, cascade.blend, cascade.moments, cascade.stage_steps) == (11, 1.0, "reset", 10)


def test_rounds_of_all_layers_are_a_chain_of_rank_one(tmp_path):
    method = XGBLoRA(inner=LoRA(rank=1), active_layers=4, stage_steps=2)
    _, boosted, _ = staged(tmp_path, method=method, max_steps=6)
    _, chain, _ = staged(tmp_path, method=COLA(inner=LoRA(rank=1), stage_steps=2), max_steps=6)
    for step in range(1, 7):
        assert all(torch.equal(*pair) for pair in zip(boosted.weights[step], chain.weights[step], strict=True))


def test_the_step_size_scales_what_a_round_adds(tmp_path):
    """The change of a round is alpha_t B A on the layers that were drawn, and nothing on the others."""
    c = 0.3
    method = XGBLoRA(inner=LoRA(rank=1, alpha=1.0), active_layers=2, blend=c, stage_steps=3)
    module, before, after = staged(tmp_path, method=method, max_steps=3)
    changed = 0
    for i, layer in enumerate(module.layers):
        A, B = before.factors[3][i]
        change = after.weights[3][i] - layer.original_weight()
        torch.testing.assert_close(change, c * B @ A, rtol=0, atol=1e-12)
        changed += bool(change.any())
    assert changed == 2


def test_the_regulariser_counts_the_layers_that_train():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    method = XGBLoRA(inner=LoRA(rank=1), active_layers=1, factor_decay=0.5)
    ll.inject(model, method, ["0", "1"], also_train=(), seed=0)
    adapters = adapters_named(model, "default")
    for adapter in adapters.values():
        perturb(adapter)
    first, second = adapters.values()
    second.resting = True
    penalty = method.penalty(adapters)
    squares = sum(factor.detach().square().sum() for factor in (first.lora_A, first.lora_B))
    torch.testing.assert_close(penalty.detach(), 0.25 * squares)
    penalty.backward()
    torch.testing.assert_close(first.lora_B.grad, 0.5 * first.lora_B)
    assert second.lora_B.grad is None
    assert XGBLoRA(inner=LoRA(rank=1)).penalty(adapters) is None
    with pytest.raises(SettingsError, match=r"XGBLoRA\.factor_decay is -1\.0; it must be at least 0"):
        XGBLoRA(inner=LoRA(rank=1), factor_decay=-1.0)
