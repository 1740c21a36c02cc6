"""SoRA: the contract, its proximal operators, the whole training loop against a float64 reference, exact resume."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from projects import Wide, fit
from resuming import SaveAt, assert_equal_runs, at_step, run
from torch import nn
from toy_runs import classification, encoder_folder, labelled_data

from ll_lora import LoRA
from ll_sora import SoRA
from ll_sora.callback import ProximalStep, shrunk, strength
from lora_lightning.callbacks import InjectAdapters, RankPruning
from lora_lightning.errors import NoEffectError, SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named, trainable_adapters
from lora_lightning.testing import MethodContract


class TestSoRA(MethodContract):
    method = SoRA(rank=2, alpha=4.0, gate_penalty=0.1)
    base_kinds = ("Linear",)
    repeated = ("test_compiles",)
    test_refuses_other_kinds_of_layer = None  # the class below takes all kinds


@pytest.mark.slow
class TestSoRAOnEveryLayer(MethodContract):
    method = SoRA(rank=2, alpha=4.0)


# -- the operators -----------------------------------------------------------------------------------------------------


def test_the_soft_operator_is_the_closed_form_and_moves_towards_zero():
    gates = torch.linspace(-1, 1, 41, dtype=torch.float64)
    found = shrunk(gates, 0.3, "soft")
    expected = np.sign(gates.numpy()) * np.maximum(np.abs(gates.numpy()) - 0.3, 0)
    np.testing.assert_allclose(found, expected, atol=1e-15)
    assert (found.abs() <= gates.abs()).all()
    assert (found * gates >= 0).all()
    assert shrunk(torch.zeros(3), 0.3, "soft").count_nonzero() == 0
    assert torch.equal(shrunk(gates, 0.0, "soft"), gates)


def test_the_released_operator_closes_all_within_two_thresholds_but_the_threshold_itself():
    gates = torch.tensor([0.15, 0.25, -0.15, -0.25, 0.125, -0.125, 0.05], dtype=torch.float64)
    found = shrunk(gates, 0.125, "released")
    assert found.tolist() == [0.0, 0.125, 0.0, -0.125, 0.125, -0.125, 0.0]
    assert shrunk(gates, 0.125, "soft").tolist() == pytest.approx([0.025, 0.125, -0.025, -0.125, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("tau", [0.03, 0.25])
def test_a_gate_without_gradient_is_zero_after_its_size_over_the_threshold(tau):
    gate = torch.tensor([1.01, -0.4, 0.07], dtype=torch.float64)
    closed_at = [math.ceil(abs(float(g)) / tau) for g in gate]
    for step in range(1, max(closed_at) + 1):
        gate = shrunk(gate, tau, "soft")
        assert [bool(g == 0) for g in gate] == [step >= at for at in closed_at]


def test_strengths_rise_in_equal_stages():
    assert [strength(t, 8, 4, 0.1, 0.4) for t in range(1, 9)] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])
    assert strength(5, None, 1, 0.0, 0.4) == 0.4


# -- training ----------------------------------------------------------------------------------------------------------


class Loop:
    """Our adapter and callback, driven by hand at the callback's two moments, on squared loss."""

    def __init__(self, total=20, lr=0.2, **settings):
        torch.manual_seed(0)
        self.method = SoRA(**{"rank": 4, "alpha": 8.0, **settings})
        self.model = nn.Sequential(nn.Linear(12, 9, dtype=torch.float64))
        inject(self.model, self.method, seed=0)
        self.adapters = trainable_adapters(self.model)
        (self.adapter,) = self.adapters.values()
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        (self.schedule,) = self.method.callbacks()
        self.schedule.trainer, self.schedule.total = SimpleNamespace(optimizers=[self.optimizer]), total
        self.t = 0

    def step(self, x, y, shrink=True):
        self.t += 1
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(x), y)
        penalty = self.method.penalty(adapters_named(self.model, "default"))
        (loss if penalty is None else loss + penalty).backward()
        self.schedule.on_gradients(self.t, self.adapters)
        self.optimizer.step()
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.9  # a scheduler moves on before a step has ended
            if shrink:
                self.schedule.on_stepped(self.t, self.adapters)


def data(steps=20):
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        yield x, torch.randn(8, 9, generator=generator, dtype=torch.float64)


def reference(loop, settings, steps=20, lr=0.2):
    """The same in numpy: gradients of the dense weight by hand, SGD with a falling rate, the proximal step."""
    base = loop.model[0].base
    W, b = base.weight.detach().numpy(), base.bias.detach().numpy()
    A, B, g = (p.detach().numpy().copy() for p in (loop.adapter.lora_A, loop.adapter.lora_B, loop.adapter.gate))
    s, penalty = 8.0 / 4, settings.get("gate_penalty", 0.0)
    for t, (x, y) in enumerate(data(steps), start=1):
        x, y = x.numpy(), y.numpy()
        error = x @ (W + s * (B * g) @ A).T + b - y
        dW = s * (2 * error / error.size).T @ x
        dA, dB = g[:, None] * (B.T @ dW), (dW @ A.T) * g
        dg = np.einsum("oi,or,ri->r", dW, B, A) + penalty * np.sign(g) / g.size
        A, B, g = A - lr * dA, B - lr * dB, g - lr * dg
        lam = settings["shrinkage"]
        if settings.get("stages", 1) == 2 and t <= steps // 2:
            lam = settings["first_shrinkage"]
        tau = lam if settings.get("threshold") == "constant" else lr * lam
        if settings.get("operator") == "released":
            g = np.where(g > tau, g - tau, np.where(g < -tau, g + tau, g))
            g = np.where(np.abs(g) < tau, 0.0, g)
        else:
            g = np.sign(g) * np.maximum(np.abs(g) - tau, 0)
        lr *= 0.9
        yield A, B, g


@pytest.mark.parametrize(
    "settings",
    [
        {"shrinkage": 0.7},
        {"shrinkage": 0.05, "threshold": "constant"},
        {"shrinkage": 0.05, "threshold": "constant", "operator": "released"},
        {"shrinkage": 1.0, "stages": 2, "first_shrinkage": 0.2},
        {"shrinkage": 0.3, "gate_penalty": 0.5},
    ],
)
def test_training_equals_a_dense_float64_reference(settings):
    loop = Loop(**settings)
    expected = reference(loop, settings)
    for (x, y), (A, B, g) in zip(data(), expected, strict=True):
        loop.step(x, y)
        np.testing.assert_allclose(loop.adapter.lora_A.detach(), A, atol=1e-12)
        np.testing.assert_allclose(loop.adapter.lora_B.detach(), B, atol=1e-12)
        np.testing.assert_allclose(loop.adapter.gate.detach(), g, atol=1e-12)
    closed = int((loop.adapter.gate == 0).sum())
    assert loop.schedule.metrics()["open_gates"] == pytest.approx(1 - closed / 4)


def test_without_shrinkage_it_is_gated_lora_bit_for_bit():
    ours, gated = Loop(shrinkage=0.0), Loop(shrinkage=0.7)
    for x, y in data():
        ours.step(x, y)
        gated.step(x, y, shrink=False)
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, gated.model.state_dict()[name]), name


def test_more_shrinkage_leaves_no_more_gates_open_and_some_end_closed():
    opened = []
    for shrinkage in (0.0, 0.3, 0.6, 1.0, 2.0):
        loop = Loop(shrinkage=shrinkage, rank=8, alpha=16.0)
        for x, y in data():
            loop.step(x, y)
        opened.append(int(loop.adapter.gate.count_nonzero()))
    assert opened == sorted(opened, reverse=True)
    assert (opened[0], opened[-1] < opened[0]) == (8, True)


def test_a_closed_gate_has_a_gradient_and_its_factors_have_none():
    loop = Loop()
    for x, y in data(3):
        loop.step(x, y, shrink=False)
    with torch.no_grad():
        loop.adapter.gate[0] = 0
    x, y = next(data())
    loop.optimizer.zero_grad()
    nn.functional.mse_loss(loop.model(x), y).backward()
    assert loop.adapter.gate.grad[0] != 0
    assert not loop.adapter.lora_A.grad[0].any()
    assert not loop.adapter.lora_B.grad[:, 0].any()


class Falling(Wide):
    """A rate that falls with each step, as Lightning steps it."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        halved = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halved, "interval": "step"}}


def test_in_a_run_the_step_takes_the_rate_that_the_optimizer_took(tmp_path):
    ends = []
    for shrinkage in (0.0, 2.0):
        module = Falling(lr=0.05)
        fit(module, tmp_path, [InjectAdapters(SoRA(rank=2, shrinkage=shrinkage), ["used"])], max_steps=1)
        ends.append(next(iter(trainable_adapters(module).values())).gate.detach())
    torch.testing.assert_close(ends[1], nn.functional.softshrink(ends[0], 0.1), atol=1e-12, rtol=0)


def test_stages_need_a_run_of_known_length(tmp_path):
    method = SoRA(rank=2, stages=2)
    with pytest.raises(
        SettingsError, match=r"SoRA\.stages is 2, but nothing bounds the steps they divide; set max_steps"
    ):
        method.callbacks()[0].check_run(None, [])


def test_it_acts_on_its_own_adapters_alone(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, SoRA(rank=2), seed=0)
    with pytest.raises(NoEffectError, match=r"RankPruning found nothing to act on: it needs .* a rank mask"):
        RankPruning(1).select(trainable_adapters(model))
    plain = nn.Sequential(nn.Linear(4, 4))
    inject(plain, LoRA(rank=2), seed=0)
    with pytest.raises(NoEffectError, match=r"ProximalStep found nothing to act on: .* may be shrunk \(SoRA\)"):
        ProximalStep(0.4).select(trainable_adapters(plain))


def test_groups_and_report_name_the_gates():
    loop = Loop(gate_lr_ratio=3.0)
    adapters = adapters_named(loop.model, "default")
    groups = loop.method.param_groups(adapters)
    assert (groups["gate"].lr_ratio, groups["gate"].weight_decay) == (3.0, 0.0)
    with torch.no_grad():
        loop.adapter.gate[:3] = 0
    assert loop.method.report(adapters)["ranks"] == {"0": 1}


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 4])
def test_resuming_at_a_step_equals_not_having_stopped(tmp_path, step):
    folder = encoder_folder(tmp_path / "encoder")
    method = SoRA(rank=4, shrinkage=60.0, stages=3, first_shrinkage=5.0, gate_penalty=0.5)
    module = lambda: classification(folder, method)  # noqa: E731
    saved = tmp_path / "saved.ckpt"
    straight = run(module(), labelled_data(folder), tmp_path / "a", [SaveAt(saved, at_step(step))], max_steps=6)
    resumed = run(module(), labelled_data(folder), tmp_path / "b", checkpoint=saved, max_steps=6)
    assert_equal_runs(straight, resumed)
    gates = [value for name, value in straight["state"].items() if name.endswith("gate")]
    assert sum(int((gate == 0).sum()) for gate in gates) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shrinkage": -0.1}, r"SoRA.shrinkage is -0.1; it must be at least 0"),
        ({"gate_penalty": -1.0}, r"SoRA.gate_penalty is -1.0; it must be at least 0"),
        ({"stages": 0}, r"SoRA.stages is 0; it must be at least 1"),
        ({"operator": "hard"}, r'SoRA.operator is "hard".* It takes: "soft", "released"'),
        ({"gate_lr_ratio": 0.0}, r"SoRA.gate_lr_ratio is 0.0; it must be above 0"),
        ({"rank": 0}, r"SoRA.rank is 0; it must be at least 1"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        SoRA(**settings)
