"""BeamLoRA: the contract, its weights, LoRA at the start, and exact resume; rewrites are in `callbacks`' tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from resuming import SaveAt, assert_equal_runs, at_step, run
from torch import nn
from toy_runs import classification, encoder_folder, labelled_data

from ll_beamlora import BeamLoRA
from ll_lora import LoRA
from lora_lightning.errors import SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named, trainable_adapters
from lora_lightning.testing import MethodContract


class TestBeamLoRA(MethodContract):
    method = BeamLoRA(rank=2, alpha=4.0)
    base_kinds = ("Linear",)
    repeated = ("test_compiles",)
    test_refuses_other_kinds_of_layer = None  # the class below takes all kinds


@pytest.mark.slow
class TestBeamLoRAOnEveryLayer(MethodContract):
    method = BeamLoRA(rank=2, alpha=4.0)


def layer(method) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9, dtype=torch.float64))
    inject(model, method, seed=0)
    (adapter,) = trainable_adapters(model).values()
    return model, adapter


def test_weights_sum_to_the_rank_and_are_the_softmax():
    _, adapter = layer(BeamLoRA(rank=5, temperature=0.3))
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor([0.1, -0.2, 0.0, 0.4, 0.3]))
    powers = np.exp(adapter.gate.detach().numpy() / 0.3)
    np.testing.assert_allclose(adapter.rank_weights().detach(), 5 * powers / powers.sum(), atol=1e-14)
    assert float(adapter.rank_weights().detach().sum()) == pytest.approx(5.0, abs=1e-13)


def test_it_starts_as_lora_with_its_gradients_and_each_gate_has_one():
    torch.manual_seed(1)
    x, y = torch.randn(6, 12, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    grads = []
    for method in (BeamLoRA(rank=4, alpha=8.0), LoRA(rank=4, alpha=8.0)):
        model, adapter = layer(method)
        with torch.no_grad():
            adapter.lora_B.copy_(torch.randn(9, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
        nn.functional.mse_loss(model(x), y).backward()
        grads.append((adapter.lora_A.grad, adapter.lora_B.grad))
        if isinstance(method, BeamLoRA):
            assert adapter.gate.grad.abs().min() > 0
            assert float(adapter.gate.grad.sum()) == pytest.approx(0.0, abs=1e-12)
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other, atol=1e-14, rtol=0)


def test_the_report_has_the_smallest_and_largest_weight():
    model, adapter = layer(BeamLoRA(rank=2, temperature=1.0))
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor([0.0, 1.0]))
    low, high = BeamLoRA(rank=2).report(adapters_named(model, "default"))["weights"]["0"]
    assert (low, high) == pytest.approx((2 / (1 + 2.718281828459045), 2 * 2.718281828459045 / (1 + 2.718281828459045)))


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_resuming_at_a_step_equals_not_having_stopped(tmp_path, step):
    folder = encoder_folder(tmp_path / "encoder")
    method = BeamLoRA(rank=4, stage_steps=3, pruned_mass=0.4, end=8)
    module = lambda: classification(folder, method)  # noqa: E731
    saved = tmp_path / "saved.ckpt"
    straight = run(module(), labelled_data(folder), tmp_path / "a", [SaveAt(saved, at_step(step))], max_steps=9)
    resumed = run(module(), labelled_data(folder), tmp_path / "b", checkpoint=saved, max_steps=9)
    assert_equal_runs(straight, resumed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"BeamLoRA.temperature is 0.0; it must be above 0"),
        ({"pruned_mass": 1.0}, r"BeamLoRA.pruned_mass is 1.0; it must lie in \[0, 1\)"),
        ({"stage_steps": 0}, r"BeamLoRA.stage_steps is 0; it must be above 0, a fraction of the run"),
        ({"end": 0.0}, r"BeamLoRA.end is 0.0; it must be above 0"),
        ({"details": "code"}, r'BeamLoRA.details is "code".* It takes: "paper", "released"'),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        BeamLoRA(**settings)
