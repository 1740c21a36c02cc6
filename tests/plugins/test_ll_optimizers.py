"""LoRA+, LoRA-FA, LoRA-RITE and LoRA-Pro: dense float64 references and every stated invariant."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import yaml
from factor_problem import Problem, bound, invertible, projections, run, saved
from torch import nn
from toy_runs import classification, encoder_folder, labelled_data, labelled_file, trainer

from ll_lora import LoRA
from ll_optimizers.fa import LoRAFA
from ll_optimizers.plus import LoRAPlus
from ll_optimizers.pro import LoRAPro, factor_steps
from ll_optimizers.rite import LoRARITE, inverse_root, polar
from lora_lightning import inject, plugins
from lora_lightning.adapters.base import FactorPair
from lora_lightning.cli.main import main
from lora_lightning.errors import SettingsError, TrainingError
from lora_lightning.optim.groups import build_optimizer, factor_pairs
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.optim.wrapper import OptimizerWrapper

FREE = {"skip_rms": None, "clip_norm": None}
"""LoRA-RITE without its valves."""


def small(method=None, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    inject(net, method or LoRA(rank=2), ["0"], also_train=["2"], seed=0)
    return net


def frozen_A(**options) -> Problem:
    """A problem whose first factor is a buffer."""
    problem = Problem(**options)
    problem.A.requires_grad_(False)
    problem.pair = FactorPair("p", problem.A.detach(), problem.B, problem.scaling)
    return problem


def bound_fa(problem, **settings):
    optimizer = LoRAFA([problem.B], **settings)
    optimizer.bind_pairs((problem.pair,))
    return optimizer


def test_the_plugin_provides_seven_optimizers():
    registry = plugins.load()
    plugins.load_classes(registry, {"lora_lightning_optimizers": torch.optim.Optimizer})
    names = {name for name, (plugin, _) in registry.classes.items() if plugin == "ll_optimizers"}
    assert names == {"LoRAPlus", "LoRAFA", "LoRARITE", "LoRAPro", "RiemannianSGD", "RiemannianAdamW", "Multiplicative"}


# -- LoRA+ -------------------------------------------------------------------------------------------------------------


def plus(net, ratio, inner=None):
    return build_optimizer(net, lambda groups: LoRAPlus(groups, ratio=ratio, inner=inner))


def test_plus_rates_by_group_with_every_parameter_in_exactly_one():
    net = small()
    optimizer = plus(net, 8.0, lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.2, betas=(0.5, 0.6)))
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {"A": 0.01, "B": 0.08, "head": 0.01}
    assert {(g["weight_decay"], g["betas"]) for g in optimizer.param_groups} == {(0.2, (0.5, 0.6))}
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters() if p.requires_grad)


def test_plus_splits_a_mixed_group_and_keeps_its_options_and_start_rate():
    net = small()
    params = [p for p in net.parameters() if p.requires_grad]
    group = {"params": params, "lr": 0.01, "initial_lr": 0.02, "name": "all", "momentum": 0.5}
    optimizer = LoRAPlus([group], ratio=4.0, inner=lambda groups: torch.optim.SGD(groups, lr=1.0))
    (pair,) = factor_pairs(net)
    optimizer.bind_pairs((pair,))
    rest, second = optimizer.param_groups
    assert (second["name"], second["lr"], second["initial_lr"], second["momentum"]) == ("all.B", 0.04, 0.08, 0.5)
    assert (rest["name"], rest["lr"], rest["initial_lr"]) == ("all", 0.01, 0.02)
    assert [id(p) for p in second["params"]] == [id(pair.lora_B)]
    assert optimizer.inner.param_groups is optimizer.param_groups
    with pytest.raises(TrainingError, match="bind_pairs was called twice"):
        optimizer.bind_pairs((pair,))


def test_plus_with_ratio_one_is_the_inner_optimizer_bit_for_bit():
    def inner(groups):
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)

    nets = [small(), small()]
    optimizers = [plus(nets[0], 1.0, inner), build_optimizer(nets[1], inner)]
    x = torch.randn(8, 6)
    for net, optimizer in zip(nets, optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    for one, two in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one, two)


def test_plus_first_sgd_step_from_zero_moves_B_by_the_ratio_and_A_not():
    net = small()
    (pair,) = factor_pairs(net)
    optimizer = plus(net, 16.0, lambda groups: torch.optim.SGD(groups, lr=0.01))
    A = pair.lora_A.detach().clone()
    net(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    assert torch.equal(pair.lora_A, A)
    torch.testing.assert_close(pair.lora_B.detach(), -0.16 * pair.lora_B.grad)


def test_plus_schedule_keeps_the_ratio_at_every_step():
    net = small()
    optimizer = plus(net, 16.0, lambda groups: torch.optim.SGD(groups, lr=0.5))
    schedule = WarmUp(warmup_fraction=0.3, decay="cosine").schedule(optimizer, 10)
    for _ in range(10):
        rates = {g["name"]: g["lr"] for g in optimizer.param_groups}
        assert rates["B"] == pytest.approx(16 * rates["A"], rel=1e-12)
        assert rates["head"] == rates["A"]
        optimizer.step()
        schedule.step()


def test_plus_resumes_exactly_and_its_default_is_adamw():
    nets = [small(), small()]
    x = torch.randn(8, 6)

    def steps(net, optimizer, n):
        for _ in range(n):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()

    whole = plus(nets[0], 4.0)
    assert type(whole.inner) is torch.optim.AdamW
    assert whole.defaults["ratio"] == 4.0
    steps(nets[0], whole, 4)
    first = plus(nets[1], 4.0)
    steps(nets[1], first, 2)
    second = plus(nets[1], 4.0)
    second.load_state_dict(saved(first))
    steps(nets[1], second, 2)
    for one, two in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one, two)


def test_plus_refuses_what_has_no_second_factor_to_speed_up():
    net = small(LoRA(rank=2, train="A"))
    with pytest.raises(TrainingError, match="LoRAPlus needs factor pairs whose second factor trains"):
        plus(net, 16.0)
    with pytest.raises(TrainingError, match="LoRAPlus needs factor pairs whose second factor trains"):
        LoRAPlus(nn.Linear(2, 2).parameters()).bind_pairs(())
    unbound = LoRAPlus(small().parameters())
    with pytest.raises(
        TrainingError, match=r"LoRAPlus does not know the factor pairs; call optimizer.bind_pairs\(lora"
    ):
        unbound.step()
    with pytest.raises(SettingsError, match=r"LoRAPlus.ratio is 0.5; it must be at least 1"):
        LoRAPlus(net.parameters(), ratio=0.5)


@pytest.mark.parametrize("inner", [LoRAPro, LoRARITE])
def test_plus_around_an_optimizer_that_balances_factors_warns(inner):
    with pytest.warns(UserWarning, match=f"LoRAPlus around {inner.__name__}: that optimizer balances"):
        optimizer = plus(small(), 2.0, inner)
    assert optimizer.inner.pairs
    assert optimizer.clips_itself == inner.clips_itself


def test_plus_with_a_nested_optimizer_through_the_command_line(tmp_path, monkeypatch):
    folder = encoder_folder(tmp_path / "model")
    labelled_file(folder / "train.csv", rows=24)
    nested = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    config = {
        "model": {
            "pretrained": str(folder),
            "method": {"class_path": "LoRA", "init_args": {"rank": 2}},
            "targets": ["query", "value"],
            "linear_baseline": False,
            "optimizer": {"class_path": "LoRAPlus", "init_args": {"ratio": 16, "inner": nested}},
        },
        "data": {
            "class_path": "LabelledText",
            "init_args": {"train": f"{folder}/train.csv", "validation": f"{folder}/train.csv", "batch_size": 4},
        },
        "trainer": {"max_steps": 3, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    (tmp_path / "plus.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    rates = {}
    build = build_optimizer

    def look(*args):
        optimizer = build(*args)
        rates.update({group["name"]: group["lr"] for group in optimizer.param_groups})
        return optimizer

    monkeypatch.setattr("lora_lightning.training.module.build_optimizer", look)
    assert main(["fit", "--config", "plus.yaml"]) == 0
    assert rates == {"A": 1e-3, "B": 16e-3, "head": 3e-3}


# -- LoRA-FA -----------------------------------------------------------------------------------------------------------


def test_fa_equals_a_dense_adamw_on_the_corrected_gradient():
    problem = frozen_A(lead=(2,))
    A, B = problem.A.detach().clone(), problem.B.detach().clone()
    s, m, v, lr, wd = problem.scaling, 0.0, 0.0, 0.02, 0.1
    optimizer = bound_fa(problem, lr=lr, weight_decay=wd, damping=1e-3)
    for t in range(1, 6):
        problem.backward()
        G = problem.weights * (s * B @ A - problem.target)
        h = s * G @ A.mT @ torch.linalg.inv(A @ A.mT + 1e-3 * torch.eye(3, dtype=A.dtype)) / s**2
        m, v = 0.9 * m + 0.1 * h, 0.999 * v + 0.001 * h * h
        B = B * (1 - lr * wd) - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6)
        optimizer.step()
        torch.testing.assert_close(problem.B.detach(), B, rtol=0, atol=1e-11)
    assert torch.equal(problem.A, A)


def corrected_gradient(problem, monkeypatch) -> torch.Tensor:
    """h_B, seen by taking Adam away."""
    monkeypatch.setattr("ll_optimizers.fa.adam", lambda optimizer, found, form: found)
    before = problem.B.detach().clone()
    problem.backward()
    bound_fa(problem, lr=1.0, damping=0.0).step()
    return before - problem.B.detach()


def test_fa_sgd_step_moves_the_weight_by_the_gradient_projected_on_the_rows_of_A(monkeypatch):
    problem = frozen_A()
    P_A, G = projections(problem)[1], problem.G()
    dW = -problem.scaling * corrected_gradient(problem, monkeypatch) @ problem.A.detach()
    torch.testing.assert_close(dW, -G @ P_A, rtol=0, atol=1e-12)
    torch.testing.assert_close(dW @ (torch.eye(7, dtype=dW.dtype) - P_A), torch.zeros_like(dW), rtol=0, atol=1e-12)


def test_fa_orthonormal_rows_and_unit_scaling_leave_the_gradient(monkeypatch):
    problem = frozen_A(scaling=1.0)
    problem.A.data.copy_(torch.linalg.qr(problem.A.detach().T)[0].T)
    h = corrected_gradient(problem, monkeypatch)
    torch.testing.assert_close(h, problem.B.grad, rtol=0, atol=1e-13)


def test_fa_a_scaled_A_leaves_the_sgd_path_of_the_product(monkeypatch):
    monkeypatch.setattr("ll_optimizers.fa.adam", lambda optimizer, found, form: found)
    one, other = frozen_A(zero_B=True), frozen_A(zero_B=True)
    other.A.data.mul_(7.0)
    for problem in (one, other):
        run(bound_fa(problem, lr=0.3, damping=0.0), 4, problem)
    assert one.weight().any()
    torch.testing.assert_close(one.weight(), other.weight(), rtol=0, atol=1e-12)


def test_fa_cached_inverse_is_kept_and_dropped_when_A_is_written():
    problem = frozen_A()
    optimizer = bound_fa(problem, damping=0.0)
    run(optimizer, 1, problem)
    (kept,) = optimizer._kept[1]
    run(optimizer, 1, problem)
    assert optimizer._kept[1][0] is kept
    A = problem.pair.lora_A
    torch.testing.assert_close(kept.L[0] @ kept.L[0].T, A @ A.T, rtol=0, atol=1e-13)
    A.mul_(2.0)
    run(optimizer, 1, problem)
    (fresh,) = optimizer._kept[1]
    torch.testing.assert_close(fresh.L, 2 * kept.L, rtol=0, atol=1e-13)


def test_fa_in_the_form_of_transformers_equals_the_optimizer_of_peft():
    lorafa = pytest.importorskip("peft.optimizers.lorafa")
    ours, theirs = frozen_A(), frozen_A()
    settings = {"lr": 0.05, "eps": 1e-3, "weight_decay": 0.2}
    optimizer = bound_fa(ours, **settings, adam_form="transformers")
    group = {"params": [theirs.A, theirs.B], "names": ["lora_A", "lora_B"], "scaling_factors": [theirs.scaling] * 2}
    reference = lorafa.LoraFAOptimizer([group], **settings)
    for _ in range(4):
        run(optimizer, 1, ours)
        theirs.backward()
        reference.step()
        torch.testing.assert_close(ours.B.detach(), theirs.B.detach(), rtol=0, atol=1e-12)
    other = frozen_A()
    run(bound_fa(other, **settings), 4, other)
    assert float((other.B - theirs.B).detach().abs().max()) > 1e-4


def test_fa_trains_B_of_lora_and_leaves_A_bit_identical():
    net = small(LoRA(rank=2, train="B"))
    (pair,) = factor_pairs(net)
    A, B, head = (t.detach().clone() for t in (pair.lora_A, pair.lora_B, net[2].weight))
    optimizer = build_optimizer(net, LoRAFA)
    for _ in range(3):
        net(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    assert torch.equal(pair.lora_A, A)
    assert not torch.equal(pair.lora_B, B)
    assert not torch.equal(net[2].weight, head)


def test_fa_refuses_a_first_factor_that_trains():
    with pytest.raises(TrainingError, match=r"LoRAFA: the factor pair .*trains A.*set the method's option train: B"):
        build_optimizer(small(), LoRAFA)


# -- LoRA-Pro ----------------------------------------------------------------------------------------------------------


def steps_of(problem, balance="closest", damping=0.0, smallest=1e-6):
    """(h_A, h_B) and the equivalent gradient s B h_A + s h_B A."""
    problem.backward()
    tensors = [t.detach()[None] for t in (problem.A, problem.B, problem.A.grad, problem.B.grad)]
    scaling = torch.full((1, 1, 1), problem.scaling, dtype=torch.float64)
    h_A, h_B = (h[0] for h in factor_steps(*tensors, scaling, balance, damping, smallest))
    A, B = problem.A.detach(), problem.B.detach()
    return h_A, h_B, problem.scaling * (B @ h_A + h_B @ A)


def test_pro_equivalent_gradient_is_the_projection_whatever_the_balance():
    problem = Problem()
    (P_B, P_A), G = projections(problem), problem.G()
    expected = P_B @ G + (torch.eye(5, dtype=G.dtype) - P_B) @ G @ P_A
    factors = []
    for balance in ("closest", "symmetric", "zero"):
        h_A, _, equivalent = steps_of(problem, balance)
        torch.testing.assert_close(equivalent, expected, rtol=0, atol=1e-11)
        factors.append(h_A)
    assert not torch.allclose(factors[0], factors[1])
    assert not torch.allclose(factors[1], factors[2])


def test_pro_residual_is_what_both_projections_miss_and_orthogonal_to_the_step():
    problem = Problem()
    (P_B, P_A), G = projections(problem), problem.G()
    residual = G - steps_of(problem)[2]
    expected = (torch.eye(5, dtype=G.dtype) - P_B) @ G @ (torch.eye(7, dtype=G.dtype) - P_A)
    torch.testing.assert_close(residual, expected, rtol=0, atol=1e-11)
    assert abs(float((residual * (G - residual)).sum())) < 1e-10


def test_pro_balance_solves_its_sylvester_equation_and_any_other_is_further_from_the_gradients():
    problem = Problem()
    h_A, h_B, _ = steps_of(problem, "closest")
    zero_A, zero_B, _ = steps_of(problem, "zero")
    A, B, gA, gB, s = *(t.detach() for t in (problem.A, problem.B)), problem.A.grad, problem.B.grad, problem.scaling
    X = (h_A - zero_A) @ torch.linalg.pinv(A)
    torch.testing.assert_close(h_B, zero_B - B @ X, rtol=0, atol=1e-10)
    residual = B.T @ B @ X + X @ A @ A.T + torch.linalg.inv(B.T @ B) @ gA @ A.T / s**2
    assert float(residual.abs().max()) < 1e-10

    def objective(Y):
        return float((zero_A + Y @ A - gA).square().sum() + (zero_B - B @ Y - gB).square().sum())

    for seed in range(5):
        E = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert objective(X + 1e-3 * E) > objective(X)


@pytest.mark.parametrize("damping", [1e-8, 1e-2])
def test_pro_damping_is_in_the_inverses_and_not_in_the_sylvester_equation(damping):
    problem = Problem()
    (h_A, h_B, _), (zero_A, zero_B, _) = (steps_of(problem, balance, damping) for balance in ("closest", "zero"))
    A, B, gA, s = problem.A.detach(), problem.B.detach(), problem.A.grad, problem.scaling
    X = (h_A - zero_A) @ torch.linalg.pinv(A)
    torch.testing.assert_close(h_B, zero_B - B @ X, rtol=0, atol=1e-10)
    damped = torch.linalg.inv(B.T @ B + damping * torch.eye(len(X), dtype=X.dtype))
    residual = B.T @ B @ X + X @ A @ A.T + damped @ gA @ A.T / s**2
    assert float(residual.abs().max()) < 1e-10


def test_pro_symmetric_balance_gives_half_the_overlap_to_each_side():
    problem = Problem()
    (P_B, P_A), G = projections(problem), problem.G()
    h_A, h_B, _ = steps_of(problem, "symmetric")
    by_A, by_B = problem.scaling * problem.B.detach() @ h_A, problem.scaling * h_B @ problem.A.detach()
    overlap = P_B @ G @ P_A
    torch.testing.assert_close(by_A, P_B @ G - overlap / 2, rtol=0, atol=1e-11)
    torch.testing.assert_close(by_B, G @ P_A - overlap / 2, rtol=0, atol=1e-11)


def test_pro_at_full_rank_the_equivalent_gradient_is_the_full_one():
    problem = Problem(r=5)
    torch.testing.assert_close(steps_of(problem)[2], problem.G(), rtol=0, atol=1e-9)


def test_pro_loss_falls_as_the_descent_formula_says():
    problem = Problem()
    P_B, _ = projections(problem)
    h_A, h_B, _ = steps_of(problem)
    A, B, gA, gB, s = *(t.detach() for t in (problem.A, problem.B)), problem.A.grad, problem.B.grad, problem.scaling
    of_A = (gA.T @ torch.linalg.inv(B.T @ B) @ gA).trace()
    of_B = (gB.T @ (torch.eye(5, dtype=A.dtype) - P_B) @ gB @ torch.linalg.inv(A @ A.T)).trace()
    expected = -(of_A + of_B) / s**2

    def loss(lr):
        weight = s * (B - lr * h_B) @ (A - lr * h_A)
        return 0.5 * (problem.weights * (weight - problem.target).square()).sum()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert float(slope) == pytest.approx(float(expected), rel=1e-6)
    assert float(expected) < 0


def test_pro_scaled_gradient_descent_counts_the_overlap_once_more():
    problem = Problem()
    (P_B, P_A), G = projections(problem), problem.G()
    _, _, equivalent = steps_of(problem)
    A, B, gA, gB, s = *(t.detach() for t in (problem.A, problem.B)), problem.A.grad, problem.B.grad, problem.scaling
    scaled = s * B @ torch.linalg.inv(B.T @ B) @ gA + s * gB @ torch.linalg.inv(A @ A.T) @ A
    torch.testing.assert_close(scaled / s**2 - equivalent, P_B @ G @ P_A, rtol=0, atol=1e-11)


def test_pro_a_factor_near_zero_is_not_inverted():
    tiny = Problem()
    tiny.B.data.mul_(1e-9)
    h_A, h_B, _ = steps_of(tiny, damping=1e-8)
    A, s = tiny.A.detach(), tiny.scaling
    assert torch.equal(h_A, tiny.A.grad)
    expected = tiny.B.grad @ torch.linalg.inv(A @ A.T + 1e-8 * torch.eye(3, dtype=A.dtype)) / s**2
    torch.testing.assert_close(h_B, expected, rtol=0, atol=1e-10)
    turned = Problem()  # as an embedding starts: A is the side near zero
    turned.A.data.mul_(1e-9)
    h_A, h_B, _ = steps_of(turned)
    B = turned.B.detach()
    assert torch.equal(h_B, turned.B.grad)
    torch.testing.assert_close(h_A, torch.linalg.inv(B.T @ B) @ turned.A.grad / s**2, rtol=0, atol=1e-12)


def dense_steps(A, B, gA, gB, s, damping):
    """h_A and h_B as the released code computes them: damped inverses, an undamped Sylvester equation."""
    I_r = torch.eye(3, dtype=A.dtype)
    of_A, of_B = torch.linalg.inv(A @ A.T + damping * I_r), torch.linalg.inv(B.T @ B + damping * I_r)
    right = -(of_B @ gA @ A.T / s**2).T.reshape(-1)  # vec of the Sylvester equation, columns first
    kron = torch.kron(I_r, B.T @ B) + torch.kron(A @ A.T, I_r)
    X = torch.linalg.solve(kron, right).reshape(3, 3).T
    return [of_B @ gA / s**2 + X @ A, (gB - B @ of_B @ B.T @ gB) @ of_A / s**2 - B @ X]


@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_pro_with_moments_of_the_weight_equals_a_dense_reference(damping):
    """Adam's moments are those of the full step, formed here, and its quotient stands for the full gradient."""
    problem, lr, wd = Problem(), 0.01, 0.2
    dense = copy.deepcopy(problem)
    optimizer = bound(LoRAPro, problem, lr=lr, weight_decay=wd, damping=damping, moments="weight")
    m = v = torch.zeros(5, 7, dtype=torch.float64)
    for t in range(1, 5):
        run(optimizer, 1, problem)
        dense.backward()
        A, B, gA, gB, s = *(x.detach() for x in dense.params), dense.A.grad, dense.B.grad, dense.scaling
        of_A, of_B = (torch.linalg.inv(gram + damping * torch.eye(3)) for gram in (A @ A.T, B.T @ B))
        full = s * B @ (of_B @ gA / s**2) + s * (gB - B @ of_B @ B.T @ gB) @ of_A / s**2 @ A
        m, v = 0.9 * m + 0.1 * full, 0.999 * v + 0.001 * full * full
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        for param, h in zip(dense.params, dense_steps(A, B, s * B.T @ u, s * u @ A.T, s, damping), strict=True):
            param.data.mul_(1 - lr * wd).sub_(lr * h)
        torch.testing.assert_close(problem.A.detach(), dense.A.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(problem.B.detach(), dense.B.detach(), rtol=0, atol=1e-10)


def test_pro_at_full_rank_moments_of_the_weight_are_those_of_full_fine_tuning():
    """The weight moves by lr u to first order, with u Adam's of the full gradient."""
    problem, lr = Problem(r=5), 1e-6
    before, G = problem.weight().detach(), problem.G()
    run(bound(LoRAPro, problem, lr=lr, damping=0.0, moments="weight"), 1, problem)
    torch.testing.assert_close((before - problem.weight().detach()) / lr, G.sign(), rtol=0, atol=1e-4)


def test_pro_moments_of_the_weight_resume_exactly():
    whole, first = Problem(), Problem()
    run(bound(LoRAPro, whole, lr=0.01, moments="weight"), 5, whole)
    optimizer = bound(LoRAPro, first, lr=0.01, moments="weight")
    run(optimizer, 2, first)
    second = bound(LoRAPro, first, lr=0.01, moments="weight")
    second.load_state_dict(saved(optimizer))
    run(second, 3, first)
    assert torch.equal(whole.A, first.A)
    assert torch.equal(whole.B, first.B)


def test_pro_moments_of_the_weight_need_adam():
    with pytest.raises(SettingsError, match=r'LoRAPro.moments is \'weight\'; it takes "factors", or "weight" where'):
        bound(LoRAPro, Problem(), rule="sgd", moments="weight")


@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_pro_training_equals_a_dense_reference(rule, damping):
    problem, lr, wd = Problem(), 0.01, 0.2
    dense = copy.deepcopy(problem)
    optimizer = bound(LoRAPro, problem, lr=lr, rule=rule, weight_decay=wd, damping=damping)
    m, v = {0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}
    for t in range(1, 5):
        run(optimizer, 1, problem)
        dense.backward()
        steps = dense_steps(*(x.detach() for x in dense.params), dense.A.grad, dense.B.grad, dense.scaling, damping)
        for i, (param, h) in enumerate(zip(dense.params, steps, strict=True)):
            if rule == "adamw":
                m[i], v[i] = 0.9 * m[i] + 0.1 * h, 0.999 * v[i] + 0.001 * h * h
                h = (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            param.data.mul_(1 - lr * wd).sub_(lr * h)
        torch.testing.assert_close(problem.A.detach(), dense.A.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(problem.B.detach(), dense.B.detach(), rtol=0, atol=1e-10)


# -- LoRA-RITE ---------------------------------------------------------------------------------------------------------


class QRReference:
    """One pair in float64 with QR in place of polar, loops in place of batches, written from the equations."""

    def __init__(self, problem, lr, b1=0.9, b2=0.999, eps=1e-6, wd=0.0, escaped=False, turn=True):
        self.p, self.lr, self.b1, self.b2, self.eps, self.wd, self.escaped, self.turn = (
            problem, lr, b1, b2, eps, wd, escaped, turn,
        )  # fmt: skip
        self.L, self.R = problem.A.detach().T.clone(), problem.B.detach().clone()
        r = self.R.shape[1]
        self.M = {"L": torch.zeros_like(self.L), "R": torch.zeros_like(self.R)}
        self.V = {side: torch.zeros(r, r, dtype=self.L.dtype) for side in "LR"}
        self.rho = {"L": 0.0, "R": 0.0}
        self.before = {"L": torch.zeros_like(self.L), "R": torch.zeros_like(self.R)}
        self.t = 0

    def step(self):
        s, I = self.p.scaling, torch.eye(self.R.shape[1], dtype=self.R.dtype)  # noqa: E741
        G = self.p.weights * (s * self.R @ self.L.T - self.p.target)
        g = {"L": s * G.T @ self.R, "R": s * G @ self.L}
        tall = {"L": self.L, "R": self.R}
        Q = {side: torch.linalg.qr(x) for side, x in tall.items()}
        b1 = self.b1 * (1 - self.b1**self.t) / (1 - self.b1 ** (self.t + 1))
        b2 = self.b2 * (1 - self.b2**self.t) / (1 - self.b2 ** (self.t + 1))
        new = {}
        for side, other in (("L", "R"), ("R", "L")):
            root = torch.linalg.inv(Q[other].R)
            h = g[side] @ root
            P = Q[other].Q.T @ self.before[other] if self.turn else I * (self.t > 0)
            carried = P @ self.V[side] @ P.T
            if self.escaped:
                gap = torch.linalg.eigvalsh(self.V[side]) - torch.linalg.eigvalsh(carried)
                lost = min(max(0.0, float(gap.max())), max(0.0, float((self.V[side] - carried).trace())))
                self.rho[side] = b2 * (self.rho[side] + lost)
            self.V[side] = (1 - b2) * h.T @ h / h.shape[0] + b2 * carried
            values, vectors = torch.linalg.eigh(self.V[side])
            S = h @ vectors @ torch.diag(1 / ((values.clamp_min(0) + self.rho[side]).sqrt() + self.eps)) @ vectors.T
            self.M[side] = (1 - b1) * S + b1 * self.M[side] @ P.T
            new[side] = tall[side] - self.lr * (self.M[side] @ root.T + self.wd * tall[side])
        self.before = {side: q.Q for side, q in Q.items()}
        self.L, self.R = new["L"], new["R"]
        self.t += 1


@pytest.mark.parametrize(
    ("settings", "reference"),
    [({}, {}), ({"weight_decay": 0.5}, {"wd": 0.5}), ({"escaped_mass": True}, {"escaped": True})],
)
def test_rite_polar_equals_qr_step_by_step(settings, reference):
    problem = Problem(d_in=6)
    dense = QRReference(problem, 0.05, **reference)
    optimizer = bound(LoRARITE, problem, lr=0.05, floor=0.0, **FREE, **settings)
    for _ in range(8):
        run(optimizer, 1, problem)
        dense.step()
        torch.testing.assert_close(problem.A.detach(), dense.L.T, rtol=0, atol=1e-11)
        torch.testing.assert_close(problem.B.detach(), dense.R, rtol=0, atol=1e-11)


def test_rite_escaped_mass_changes_the_steps_once_the_factors_have_turned():
    plain, made_up = Problem(), Problem()
    for problem, escaped in ((plain, False), (made_up, True)):
        run(bound(LoRARITE, problem, lr=0.1, escaped_mass=escaped, **FREE), 4, problem)
    assert float((plain.weight() - made_up.weight()).detach().abs().max()) > 1e-6


@pytest.mark.parametrize("valves", [FREE, {"skip_rms": 1.0, "clip_norm": 0.5}, {**FREE, "cap_rms": 0.5}])
@pytest.mark.parametrize("change", ["matrix", "number"])
def test_rite_product_does_not_depend_on_the_factorisation(change, valves):
    one = Problem(scaling=0.1)
    other = one.turned(invertible(3) if change == "matrix" else 7.0 * torch.eye(3, dtype=torch.float64))
    optimizers = [bound(LoRARITE, problem, lr=0.05, **valves) for problem in (one, other)]
    start = one.weight().detach()
    for _ in range(8):
        for problem, optimizer in zip((one, other), optimizers, strict=True):
            run(optimizer, 1, problem)
        torch.testing.assert_close(one.weight(), other.weight(), rtol=0, atol=1e-12)
    assert float((one.weight().detach() - start).abs().max()) > 1e-3


def test_rite_without_the_change_of_basis_the_product_depends_on_it():
    one = Problem()
    other = one.turned(invertible(3))
    ends = []
    for problem in (one, other):
        dense = QRReference(problem, 0.05, turn=False)
        for _ in range(8):
            dense.step()
        ends.append(problem.scaling * dense.R @ dense.L.T)
    assert float((ends[0] - ends[1]).abs().max()) > 1e-6


def test_rite_a_constant_factor_on_the_loss_changes_nothing():
    one, other = Problem(), Problem()
    for problem, factor in ((one, 1.0), (other, 1e3)):
        run(bound(LoRARITE, problem, lr=0.05, eps=1e-14, **FREE), 6, problem, factor=factor)
    torch.testing.assert_close(one.weight(), other.weight(), rtol=0, atol=1e-10)


def test_rite_skipped_sides_stay_in_the_first_step_and_clipping_bounds_all_layers_together():
    problem = Problem()
    A, B = problem.A.detach().clone(), problem.B.detach().clone()
    run(bound(LoRARITE, problem, skip_rms=1e-6, clip_norm=None), 1, problem)
    assert torch.equal(problem.A, A)
    assert torch.equal(problem.B, B)
    pair = [Problem(), Problem(r=2, seed=1)]
    optimizer = bound(LoRARITE, *pair, skip_rms=None, clip_norm=0.25)
    run(optimizer, 1, *pair)
    # after one step V is h'h / d with the clipped h, so its traces give the norm
    total = sum(
        float(optimizer.state[p]["second"].trace()) * (p.shape[1 if p is q.A else 0]) for q in pair for p in q.params
    )
    assert math.sqrt(total) == pytest.approx(0.25, rel=1e-9)


def test_rite_parameters_in_no_pair_are_clipped_apart_and_take_adam():
    net, reference = small(), small()
    optimizer = build_optimizer(net, lambda groups: LoRARITE(groups, lr=0.01, clip_norm=0.1))
    plain = torch.optim.AdamW(reference[2].parameters(), lr=0.01, eps=1e-6, weight_decay=0.0)
    x = torch.randn(8, 6)
    for model in (net, reference):
        model(x).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(reference[2].parameters(), 0.1)
    plain.step()
    optimizer.step()
    torch.testing.assert_close(net[2].weight, reference[2].weight)


def test_rite_from_zero_B_moves_first_and_everything_is_finite():
    problem = Problem(zero_B=True, dtype=torch.float32)
    A = problem.A.detach().clone()
    optimizer = bound(LoRARITE, problem, lr=1e-2, **FREE)
    run(optimizer, 1, problem)
    assert torch.equal(problem.A, A)
    assert problem.B.any()
    run(optimizer, 4, problem)
    assert not torch.equal(problem.A, A)
    assert torch.isfinite(problem.B).all()


def test_rite_one_token_a_step_moves_every_factor():
    """A second moment of rank one: its rounding errors may be negative and must not lose the step."""
    torch.manual_seed(0)
    moved = 0
    for seed in range(20):
        problem = Problem(r=4, seed=seed, dtype=torch.float32)
        x, d = torch.randn(7), torch.randn(5)
        s = problem.scaling
        with torch.no_grad():
            problem.A.grad = s * problem.B.T @ torch.outer(d, x)
            problem.B.grad = s * torch.outer(d, x) @ problem.A.T
        before = [p.detach().clone() for p in problem.params]
        bound(LoRARITE, problem, lr=0.1, **FREE).step()
        sizes = [float((p.detach() - b).norm()) for p, b in zip(problem.params, before, strict=True)]
        moved += sum(0 < size < 100 for size in sizes)
    assert moved == 40


def test_rite_rows_of_a_first_step_have_unit_mean_square():
    problem = Problem(d_in=40, d_out=30)
    problem.backward()
    before, root = problem.A.detach().clone(), torch.linalg.inv(polar(problem.B.detach()[None]).root_inverse[0])
    bound(LoRARITE, problem, lr=1.0, eps=1e-14, **FREE).step()
    M = (root @ (before - problem.A.detach())).T  # the step of A is lr M R_B^-1
    torch.testing.assert_close(M.T @ M / 40, torch.eye(3, dtype=M.dtype), rtol=0, atol=1e-6)


def test_rite_polar_of_a_rank_deficient_factor():
    tall = torch.randn(1, 6, 2, dtype=torch.float64)
    tall = torch.cat([tall, tall[..., :1] + tall[..., 1:]], dim=-1)
    found = polar(tall)
    U = found.basis[0]
    torch.testing.assert_close(U.T @ U @ U.T @ U, U.T @ U, rtol=0, atol=1e-6)
    assert round(float((U.T @ U).trace())) == 2
    assert not polar(torch.zeros(1, 6, 3, dtype=torch.float64)).basis.any()


def test_rite_inverse_root():
    x = torch.randn(1, 5, 3, dtype=torch.float64)
    V = x.mT @ x
    root = inverse_root(V, torch.full((1,), 0.5, dtype=torch.float64), 0.0, 0.0)
    expected = torch.linalg.inv(V + 0.5 * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(root @ root, expected, rtol=1e-10, atol=1e-12)
    singular = torch.diag_embed(torch.tensor([[4.0, -1e-18, 0.0]], dtype=torch.float64))
    floored = inverse_root(singular, torch.zeros(1, dtype=torch.float64), 0.0, 1e-4)
    torch.testing.assert_close(floored[0].diagonal(), torch.tensor([0.5, 50.0, 50.0], dtype=torch.float64))


def test_rite_clips_itself_so_the_trainers_value_is_refused(tmp_path):
    encoder = encoder_folder(tmp_path)

    def module():
        return classification(encoder, LoRA(rank=2), optimizer=lambda groups: LoRARITE(groups, lr=1e-3))

    with pytest.raises(SettingsError, match=r"trainer.gradient_clip_val is 1.0; LoRARITE clips where its rule allows"):
        trainer(tmp_path, gradient_clip_val=1.0).fit(module(), datamodule=labelled_data(encoder))
    run = trainer(tmp_path, max_steps=4)
    run.fit(module(), datamodule=labelled_data(encoder))
    assert run.optimizers[0].report() == {}


def test_a_wrapper_clips_itself_where_what_it_wraps_does():
    class Plain(OptimizerWrapper):
        def take_step(self):
            self.inner.step()

    net = small()
    params = [p for p in net.parameters() if p.requires_grad]
    assert Plain(LoRARITE(params)).clips_itself
    assert not Plain(torch.optim.SGD(params, lr=0.1)).clips_itself


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("kind", [LoRAPro, LoRARITE])
def test_resume_equals_not_having_stopped_to_the_bit(kind, lead):
    one, stopped = (Problem(dtype=torch.float32, lead=lead) for _ in range(2))
    run(bound(kind, one, lr=0.01), 5, one)
    first = bound(kind, stopped, lr=0.01)
    run(first, 2, stopped)
    state = saved(first)
    second = bound(kind, stopped, lr=0.5)
    second.load_state_dict(state)
    run(second, 3, stopped)
    assert torch.equal(one.A, stopped.A)
    assert torch.equal(one.B, stopped.B)


def test_fa_resume_equals_not_having_stopped_to_the_bit():
    one, stopped = (frozen_A(dtype=torch.float32) for _ in range(2))
    run(bound_fa(one), 5, one)
    first = bound_fa(stopped)
    run(first, 2, stopped)
    second = bound_fa(stopped, lr=0.5)
    second.load_state_dict(saved(first))
    run(second, 3, stopped)
    assert torch.equal(one.B, stopped.B)


@pytest.mark.parametrize("kind", [LoRAPro, LoRARITE])
def test_experts_step_as_if_each_were_a_pair_of_its_own(kind):
    stacked = Problem(lead=(2,), zero_B=True)
    alone = []
    for i in range(2):
        problem = Problem(name=str(i))
        problem.A.data, problem.B.data = stacked.A.detach()[i].clone(), stacked.B.detach()[i].clone()
        problem.target, problem.weights = stacked.target[i], stacked.weights[i]
        alone.append(problem)
    run(bound(kind, stacked, lr=0.01), 3, stacked)
    run(bound(kind, *alone, lr=0.01), 3, *alone)
    for i, problem in enumerate(alone):
        torch.testing.assert_close(stacked.A[i], problem.A, rtol=0, atol=1e-12)
        torch.testing.assert_close(stacked.B[i], problem.B, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [LoRAPro, LoRARITE])
def test_pairs_without_gradients_rest_and_one_missing_gradient_counts_as_zero(kind):
    idle, zero, missing = Problem(name="idle"), Problem(name="z"), Problem(name="m")
    optimizers = [bound(kind, idle, zero, lr=0.01), bound(kind, missing, lr=0.01)]
    for problem in (zero, missing):
        problem.backward()
    zero.A.grad.zero_()
    missing.A.grad = None
    start = idle.A.detach().clone()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(idle.A, start)
    assert torch.equal(zero.A, missing.A)
    assert torch.equal(zero.B, missing.B)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (LoRAPro, {"balance": "half"}, "LoRAPro.balance is 'half'; it takes closest, symmetric, zero"),
        (LoRAPro, {"rule": "adam"}, "LoRAPro.rule is 'adam'; it takes adamw, sgd"),
        (LoRAPro, {"smallest": 1.0}, r"LoRAPro.smallest is 1.0; it must lie in \[0, 1\)"),
        (LoRARITE, {"clip_norm": 0.0}, "LoRARITE.clip_norm is 0.0; it must be above 0, or null for none"),
        (LoRARITE, {"skip_rms": -1.0}, "LoRARITE.skip_rms is -1.0; it must be above 0"),
        (LoRARITE, {"floor": -1.0}, r"LoRARITE.floor is -1.0; it must lie in \[0, 1\)"),
        (LoRAFA, {"damping": -1.0}, "LoRAFA.damping is -1.0; it must be at least 0"),
        (LoRAFA, {"eps": 0}, "LoRAFA.eps is 0; it must be above 0"),
    ],
)
def test_settings_outside_their_rules(kind, settings, message):
    with pytest.raises(SettingsError, match=message):
        kind(Problem().params, **settings)
