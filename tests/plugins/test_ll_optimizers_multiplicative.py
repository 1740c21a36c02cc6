"""Multiplicative: float64 references of the rule, its fixed points, modes by group, decay, resume and refusals."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from factor_problem import saved
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from ll_lora import LoRA
from ll_lorasc.optim import SlowFast
from ll_optimizers.multiplicative import Multiplicative
from ll_optimizers.plus import LoRAPlus
from ll_optimizers.riemannian import RiemannianAdamW
from lora_lightning import inject
from lora_lightning.errors import SettingsError, TrainingError
from lora_lightning.optim.groups import build_optimizer
from lora_lightning.optim.warmup import WarmUp

GRADIENTS = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
START = torch.tensor([0.5, -0.02, 3.0, 0.0, -1e-3], dtype=torch.float64)


def after(steps: int, factory, settings=None) -> torch.Tensor:
    """START after steps along fixed gradients."""
    parameter = nn.Parameter(START.clone())
    optimizer = factory([parameter]) if settings is None else Multiplicative([parameter], factory, **settings)
    for gradient in GRADIENTS[:steps]:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inject(model, LoRA(rank=2), ["0"], also_train=["2"], seed=0)
    return model


def train(model, optimizer, steps: int = 3, schedule=None) -> dict[str, torch.Tensor]:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("g", [1.0, 0.3])
def test_steps_equal_the_rule_around_adam_written_out(g):
    lr, b1, b2, eps, decay, eta_in, eta_out = 0.05, 0.8, 0.9, 1e-8, 0.1, 4.0, 0.2
    settings = {"mode": "hybrid", "blend": g, "eta_in": eta_in, "eta_out": eta_out}
    found = after(6, partial(AdamW, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay), settings)
    for entry, start in enumerate(START.tolist()):
        p, m, v = start, 0.0, 0.0
        for t, gradient in enumerate(GRADIENTS[:, entry].tolist(), 1):
            m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
            u = lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
            p = p - g * abs(p) * math.tanh(eta_in * u) * eta_out - (1 - g) * u - lr * decay * p
        assert float(found[entry]) == pytest.approx(p, abs=1e-13)


def test_decay_in_the_gradient_passes_through_tanh():
    lr, decay = 0.1, 0.5
    found = after(1, partial(SGD, lr=lr, weight_decay=decay), {"mode": "mult", "eta_in": 3.0, "eta_out": 0.4})
    expected = START - START.abs() * torch.tanh(3 * lr * (GRADIENTS[0] + decay * START)) * 0.4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_mult_keeps_zeros_and_signs_and_bounds_each_step():
    large, previous = partial(SGD, lr=1e4), START
    for steps in range(1, 7):
        found = after(steps, large, {"mode": "mult", "eta_out": 0.9})
        assert torch.equal(found.sign(), START.sign())
        assert bool(((found - previous).abs() <= 0.9 * previous.abs() * (1 + 1e-12)).all())
        previous = found


def test_a_small_gain_is_the_relative_step_to_first_order():
    lr, plain = 1e-3, partial(SGD, lr=1e-3)
    expected = START - lr * START.abs() * GRADIENTS[0]
    errors = []
    for eta_out in (0.02, 0.04, 0.08):  # eta_in eta_out stays 1
        found = after(1, plain, {"mode": "mult", "eta_in": 1 / eta_out, "eta_out": eta_out})
        errors.append(float((found - expected).abs().max()))
    assert errors[0] < 1e-4
    assert errors[0] > 3.9 * errors[1] > 3.9 * 3.9 * errors[2]  # tanh u = u - u^3 / 3: four times less, twice the width


@pytest.mark.parametrize("inner", [SGD, Adam, RMSprop, AdamW])
def test_without_a_relative_part_it_is_the_inner_optimizer_bit_for_bit(inner):
    factory = partial(inner, lr=0.01, weight_decay=0.1)
    for settings in ({"blend": 0.0}, {"mode": "add"}):
        assert torch.equal(after(4, factory, settings), after(4, factory))


def test_each_group_has_its_mode_and_a_schedule_acts_on_all():
    inner = partial(AdamW, lr=0.01, weight_decay=0.0)
    modes = {"A": "mult", "head": "add"}
    made = build_optimizer(model := net(), lambda groups: Multiplicative(groups, inner, modes=modes))
    assert {group["name"]: group["mode"] for group in made.param_groups} == {"A": "mult", "B": "hybrid", "head": "add"}
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    end = train(model, made, schedule=WarmUp(warmup_fraction=0.5).schedule(made, 4))
    (A,) = (name for name in end if name.endswith("lora_A"))
    assert torch.equal(end[A].sign(), start[A].sign())
    assert all(not torch.equal(end[name], start[name]) for name in end)
    still = build_optimizer(model := net(), lambda groups: Multiplicative(groups, partial(AdamW, lr=0.0, eps=1.0)))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(value, before[name]) for name, value in train(model, still).items())


@pytest.mark.parametrize(
    "inner",
    [None, partial(RiemannianAdamW, lr=1e-2, weight_decay=0.1), partial(LoRAPlus, ratio=4.0)],
    ids=["AdamW", "RiemannianAdamW", "LoRAPlus"],
)
def test_a_resume_is_exact_and_the_file_holds_the_inner_state_alone(inner):
    def made(model):
        return build_optimizer(model, lambda groups: Multiplicative(groups, inner, modes={"A": "mult"}))

    straight = train(model := net(), made(model), 4)
    train(model := net(), first := made(model), 2)
    second = made(model)
    second.load_state_dict(saved(first))
    for name, value in train(model, second, 2).items():
        assert torch.equal(value, straight[name]), name
    if inner is None:
        assert {key for state in first.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert {group["mode"] for group in second.param_groups} == {"mult", "hybrid"}
    assert second.defaults["modes"] == "A: mult"


def test_what_could_never_change_is_refused_at_the_first_step():
    optimizer = build_optimizer(model := net(), lambda groups: Multiplicative(groups, modes={"B": "mult"}))
    with pytest.raises(TrainingError, match=r"1 of 1 parameters of the group B are zero.*modes: \{B: hybrid\}"):
        train(model, optimizer)
    half = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(TrainingError, match="a parameter of the group without a name is in half precision"):
        Multiplicative([half]).step()
    Multiplicative([half], mode="add").step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "both"}, "Multiplicative.mode is 'both'; it takes add, mult or hybrid"),
        ({"modes": {"A": "multi"}}, "Multiplicative.modes.A is 'multi'; it takes add"),
        ({"modes": {"a": "mult"}}, 'modes names "a"; the groups are: A, B. Did you mean "A"'),
        ({"eta_in": 0.0}, "Multiplicative.eta_in is 0.0; it must be above 0"),
        ({"eta_out": 1.0}, r"Multiplicative.eta_out is 1.0; it must lie in \(0, 1\)"),
        ({"blend": 1.5}, r"Multiplicative.blend is 1.5; it must lie in \[0, 1\]"),
        ({"inner": SlowFast}, "Multiplicative.inner is SlowFast, whose steps are no multiples of a rate"),
    ],
)
def test_refusals(settings, message):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "name": name} for name in "AB"]
    with pytest.raises(SettingsError, match=message):
        Multiplicative(groups, **settings)


def test_a_decay_of_an_optimizer_that_is_not_known_is_refused():
    class Own(AdamW.__base__):
        """Another's optimizer."""

    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(SettingsError, match=r"Own.weight_decay is 0.1, and whether it passes .* must be 0 there"):
        Multiplicative([parameter], partial(Own, weight_decay=0.1)).step()
