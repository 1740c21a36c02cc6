"""PeriodicLoRA: the contract, its defaults, and its two ends: all unloaded, nothing unloaded."""

from __future__ import annotations

import pytest
import torch
from staged_projects import staged

import lora_lightning as ll
from ll_cola import COLA
from ll_lora import LoRA
from ll_periodic_lora import PeriodicLoRA
from lora_lightning.callbacks import Cascade
from lora_lightning.testing import MethodContract


@pytest.mark.slow  # the adapters of TestLoRA
class TestPeriodicLoRA(MethodContract):
    method = PeriodicLoRA(inner=LoRA(rank=2, alpha=4.0), stage_steps=2)
    repeated = ("test_compiles",)


def test_its_cascade():
    (cascade,) = PeriodicLoRA(inner=LoRA()).callbacks()
    assert isinstance(cascade, Cascade)
    assert (cascade.blend, cascade.remainder, cascade.blend_decay) == (0.1, "shrink", 1.0)
    assert (cascade.moments, cascade.pruned_fraction, cascade.lr) == ("prune", 0.999, "continue")


@pytest.mark.parametrize("m", [0.1, 0.5, 1.0])
def test_an_unloading_leaves_the_function_in_float32(tmp_path, m):
    method = PeriodicLoRA(inner=LoRA(rank=2), blend=m, stage_steps=3)
    _, before, after = staged(tmp_path, method=method, max_steps=6)
    for step in (3, 6):
        torch.testing.assert_close(after.weights[step], before.weights[step], rtol=0, atol=1e-12)
        assert bool(after.factors[step][0][1].any()) == (m < 1)


def test_all_unloaded_is_a_plain_chain(tmp_path):
    method = PeriodicLoRA(inner=LoRA(rank=2), blend=1.0, moments="reset", stage_steps=2)
    _, periodic, _ = staged(tmp_path, method=method, max_steps=6)
    _, chain, _ = staged(tmp_path, method=COLA(inner=LoRA(rank=2), stage_steps=2), max_steps=6)
    for step in range(1, 7):
        assert all(torch.equal(*pair) for pair in zip(periodic.weights[step], chain.weights[step], strict=True))


def test_hardly_anything_unloaded_is_plain_training(tmp_path):
    method = PeriodicLoRA(inner=LoRA(rank=2), blend=1e-12, moments="keep", stage_steps=2)
    _, periodic, _ = staged(tmp_path, method=method, max_steps=6)
    _, plain, _ = staged(tmp_path, method=LoRA(rank=2), max_steps=6)
    torch.testing.assert_close(periodic.weights[6], plain.weights[6], rtol=0, atol=1e-9)


def test_what_is_left_in_the_adapter_is_saved_and_loaded_with_what_was_unloaded(tmp_path):
    method = PeriodicLoRA(inner=LoRA(rank=1), blend=0.25, stage_steps=2)
    module, _, _ = staged(tmp_path, method=method, max_steps=5)
    ll.save_adapter(module, tmp_path / "adapter")
    fresh = type(module)()
    ll.load_adapter(fresh, tmp_path / "adapter")
    for mine, other in zip(module.layers, fresh.layers, strict=True):
        assert torch.equal(mine.weight, other.weight)
