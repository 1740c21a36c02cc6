"""AdaLoRA: the contract, its start, penalty and training against peft and a float64 reference, exact resume."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from resuming import SaveAt, assert_equal_runs, at_step, run
from torch import nn
from toy_runs import classification, encoder_folder, labelled_data

from ll_adalora import AdaLoRA
from ll_adalora.functional import distance_from_orthogonal
from lora_lightning.errors import SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named, trainable_adapters
from lora_lightning.testing import MethodContract

TOTAL = 20


class TestAdaLoRA(MethodContract):
    method = AdaLoRA(rank=2, alpha=4.0)
    base_kinds = ("Linear",)
    repeated = ("test_compiles",)
    test_refuses_other_kinds_of_layer = None  # the class below takes all kinds


@pytest.mark.slow
class TestAdaLoRAOnEveryLayer(MethodContract):
    method = AdaLoRA(rank=2, alpha=4.0)


class Net(nn.Module):
    """Two layers of different sizes; its output has a loss, to which peft adds the penalty."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 9, dtype=torch.float64), nn.Linear(9, 7, dtype=torch.float64)

    def forward(self, x, y):
        found = self.second(torch.tanh(self.first(x)))
        return SimpleNamespace(y=found, loss=nn.functional.mse_loss(found, y))


class Loop:
    """Our method on it, its callback driven by hand at the two moments of a step."""

    def __init__(self, total=TOTAL, optimizer=torch.optim.AdamW, **settings):
        given = {"rank": 4, "alpha": 8.0, "budget": 0.5, "start": 3, "end": 14, "every_n_steps": 2, **settings}
        self.method, self.model = AdaLoRA(**given), Net()
        inject(self.model, self.method, ["first", "second"], seed=0)
        self.adapters = trainable_adapters(self.model)
        self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad], lr=0.05)
        (self.schedule,) = self.method.callbacks()
        self.schedule.on_start(total, self.adapters)
        self.t = 0

    def step(self, x, y):
        self.t += 1
        self.optimizer.zero_grad()
        loss, penalty = self.model(x, y).loss, self.method.penalty(adapters_named(self.model, "default"))
        (loss if penalty is None else loss + penalty).backward()
        self.schedule.on_gradients(self.t, self.adapters)
        self.optimizer.step()
        with torch.no_grad():
            self.schedule.on_stepped(self.t, self.adapters)

    def table(self, kind):
        return self.schedule.state_dict()[kind]


def data(steps=TOTAL):
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        yield x, torch.randn(8, 7, generator=generator, dtype=torch.float64)


def theirs(loop, total=TOTAL, **settings):
    """peft's model with the same values, and its AdamW."""
    from peft import AdaLoraConfig, get_peft_model

    given = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "tinit": 3, "tfinal": total - 14, "deltaT": 2, **settings}
    config = AdaLoraConfig(target_modules=["first", "second"], total_step=total, orth_reg_weight=0.1, **given)
    model = get_peft_model(Net(), config).double()
    for name in ("first", "second"):
        layer, adapter = getattr(model.base_model.model, name), getattr(loop.model, name).adapter("default")
        layer.ranknum["default"].requires_grad_(False)  # a constant, which peft 0.21 makes trainable in float64
        with torch.no_grad():
            layer.lora_A["default"].copy_(adapter.lora_A)
            layer.lora_B["default"].copy_(adapter.lora_B)
            layer.lora_E["default"].copy_(adapter.gate[:, None])
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def pairs(loop, model):
    """(ours, theirs) of every trained tensor, in our shape."""
    for name in ("first", "second"):
        layer, adapter = getattr(model.base_model.model, name), getattr(loop.model, name).adapter("default")
        yield adapter.lora_A, layer.lora_A["default"]
        yield adapter.lora_B, layer.lora_B["default"]
        yield adapter.gate, layer.lora_E["default"]


def test_outputs_gradients_scores_and_a_whole_training_equal_those_of_peft():
    loop = Loop()
    model, optimizer = theirs(loop)
    closed = []
    for t, (x, y) in enumerate(data(), start=1):
        optimizer.zero_grad()
        torch.testing.assert_close(loop.model(x, y).y, model(x, y).y, atol=1e-12, rtol=0)
        model.base_model(x, y).loss.backward()  # which adds the penalty
        loop.step(x, y)
        for own, other in pairs(loop, model):
            torch.testing.assert_close(own.grad, other.grad.view_as(own), atol=1e-12, rtol=0)
        optimizer.step()
        model.base_model.update_and_allocate(t)
        for own, other in pairs(loop, model):
            torch.testing.assert_close(own.detach(), other.detach().view_as(own), atol=1e-11, rtol=0)
        if t < 14:
            check_scores(loop, model.base_model.rankallocator)
        closed.append(sum(int((a.gate == 0).sum()) for a in loop.adapters.values()))
    assert closed[-1] == closed[14] == 4
    assert max(closed[:3]) == 0


def check_scores(loop, allocator):
    for kind, tables in (("smooth", allocator.exp_avg_ipt), ("spread", allocator.exp_avg_unc)):
        for name, average in loop.table(kind).items():
            path, side = name.split(".adapters.default.")
            side = {"gate": "lora_E"}.get(side, side)
            other = tables[find(tables, path, side)]
            torch.testing.assert_close(average, other.view(average.shape), atol=1e-12, rtol=0)


def find(tables, path, side):
    (name,) = [name for name in tables if f"{path}.{side}." in name]
    return name


# -- an independent reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scored", ["after_step", "before_step"])
def test_scores_budget_and_choice_equal_a_reference_in_numpy(scored):
    loop = Loop(scored=scored, orthogonality=0.0, optimizer=torch.optim.SGD)
    names = list(loop.table("smooth"))
    params = {name: loop.model.get_parameter(name) for name in names}
    smooth = {name: np.zeros(tuple(p.shape)) for name, p in params.items()}
    spread = {name: np.zeros(tuple(p.shape)) for name, p in params.items()}
    for t, (x, y) in enumerate(data(), start=1):
        before = {name: p.detach().numpy().copy() for name, p in params.items()}
        loop.optimizer.zero_grad()
        loop.model(x, y).loss.backward()
        grads = {name: p.grad.numpy().copy() for name, p in params.items()}
        after = {name: before[name] - 0.05 * grads[name] for name in names}
        loop.step(x, y)
        for name in names if t < 14 else ():
            score = np.abs((after if scored == "after_step" else before)[name] * grads[name])
            smooth[name] = 0.85 * smooth[name] + 0.15 * score
            spread[name] = 0.85 * spread[name] + 0.15 * np.abs(score - smooth[name])
            np.testing.assert_allclose(loop.table("smooth")[name], smooth[name], atol=1e-14)
            np.testing.assert_allclose(loop.table("spread")[name], spread[name], atol=1e-14)
        expected = {name: after[name] for name in names if name.endswith("gate")}
        if (3 < t < 14 and t % 2 == 0) or t >= 14:
            triplets = []
            for name in expected:
                parts = [smooth[n] * spread[n] for n in (name, *(name[:-4] + side for side in ("lora_A", "lora_B")))]
                triplets.append(parts[0] + parts[1].mean(1) + parts[2].mean(0))
            budget = int(4 + 4 * (1 - (t - 3) / 11) ** 3) if t < 14 else 4
            order = np.argsort(-np.concatenate(triplets), kind="stable")
            kept = np.isin(np.arange(8), order[:budget]).reshape(2, 4)
            expected = {name: value * mask for (name, value), mask in zip(expected.items(), kept, strict=True)}
            assert sum(np.count_nonzero(value) for value in expected.values()) == budget
        for name, value in expected.items():
            np.testing.assert_allclose(params[name].detach(), value, atol=1e-13)


def test_the_penalty_is_the_mean_distance_from_orthogonal_factors():
    loop = Loop()
    distances = []
    for adapter in loop.adapters.values():
        sides = (adapter.lora_A.detach().numpy(), adapter.lora_B.detach().numpy().T)
        distances += [np.linalg.norm(rows @ rows.T - np.eye(4)) for rows in sides]
    named = adapters_named(loop.model, "default")
    assert float(loop.method.penalty(named).detach()) == pytest.approx(0.1 * np.mean(distances), rel=1e-12)
    squared = AdaLoRA(orthogonality=0.2, penalty_norm="squared").penalty(named)
    assert float(squared.detach()) == pytest.approx(0.2 * np.mean(np.square(distances)), rel=1e-12)
    with torch.no_grad():
        for adapter in loop.adapters.values():
            for factor in (adapter.lora_A, adapter.lora_B):
                nn.init.orthogonal_(factor)
    orthogonal = distance_from_orthogonal(named, squared=False)
    assert float(orthogonal.detach()) == pytest.approx(0.0, abs=1e-14)
    orthogonal.backward()
    assert all(bool(torch.isfinite(a.lora_A.grad).all()) for a in loop.adapters.values())
    assert AdaLoRA(orthogonality=0.0).penalty(named) is None


def test_the_start_is_normal_factors_and_no_weight():
    model = nn.Sequential(nn.Linear(400, 300))
    inject(model, AdaLoRA(rank=20), seed=0)
    (adapter,) = trainable_adapters(model).values()
    assert not adapter.gate.any()
    for factor in (adapter.lora_A, adapter.lora_B):
        assert float(factor.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert adapter.scaling == 16.0 / (20 + 1e-5)


def test_the_report_counts_what_is_left():
    loop = Loop()
    for x, y in data():
        loop.step(x, y)
    facts = loop.method.report(adapters_named(loop.model, "default"))
    assert (facts["kept_components"], facts["components"]) == (4, 8)
    assert sum(facts["ranks"].values()) == 4
    assert loop.schedule.metrics() == {"rank": 2.0}
    assert (loop.schedule.finished(13), loop.schedule.finished(14)) == (False, True)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_resuming_at_a_step_equals_not_having_stopped(tmp_path, step):
    folder = encoder_folder(tmp_path / "encoder")
    method = AdaLoRA(rank=4, budget=0.5, start=2, end=5, every_n_steps=1)
    module = lambda: classification(folder, method)  # noqa: E731
    saved = tmp_path / "saved.ckpt"
    straight = run(module(), labelled_data(folder), tmp_path / "a", [SaveAt(saved, at_step(step))], max_steps=7)
    resumed = run(module(), labelled_data(folder), tmp_path / "b", checkpoint=saved, max_steps=7)
    assert_equal_runs(straight, resumed)
    gates = [value for name, value in straight["state"].items() if name.endswith("gate")]
    assert sum(int((gate != 0).sum()) for gate in gates) == sum(gate.numel() for gate in gates) // 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, r"AdaLoRA.budget is 0.0; it must lie in \(0, 1\]"),
        ({"every_n_steps": 0}, r"AdaLoRA.every_n_steps is 0; it must be at least 1"),
        ({"beta2": 1.0}, r"AdaLoRA.beta2 is 1.0; it must lie in \[0, 1\)"),
        ({"start": -1.0}, r"AdaLoRA.start is -1.0; it must be at least 0"),
        ({"start": 9, "end": 5}, r"AdaLoRA.end is 5; it must come after start, which is 9"),
        ({"orthogonality": -0.1}, r"AdaLoRA.orthogonality is -0.1; it must be at least 0"),
        ({"scored": "later"}, r'AdaLoRA.scored is "later".* It takes: "after_step", "before_step"'),
        ({"penalty_norm": "square"}, r'AdaLoRA.penalty_norm is "square". Did you mean "squared"\?'),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        AdaLoRA(**settings)
