"""RoseLoRA: the contract, and every invariant of the paper and of our reading of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from ll_rose import RoseLoRA
from ll_rose.functional import density, density_bound, survey
from lora_lightning.callbacks import SparsitySchedule
from lora_lightning.callbacks.keep_masks import keep_count
from lora_lightning.errors import SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge_model import merge, unmerge
from lora_lightning.injection.records import adapters_named, trainable_adapters
from lora_lightning.testing import MethodContract

TOTAL = 20


class TestRoseLoRA(MethodContract):
    method = RoseLoRA(rank=2, alpha=4.0)


# -- an independent float64 reference, in numpy, of the whole training loop ------------------------------------------


def reference_share(t: int, start: int, end: int, tau: float) -> float:
    if t <= start:
        return 1.0
    if t >= end:
        return tau
    return tau + (1 - tau) * (1 - (t - start) / (end - start)) ** 3


def reference_top(values: np.ndarray, keep: int) -> np.ndarray:
    """Rows of a mask, by sorting (value descending, index ascending)."""
    mask = np.zeros_like(values, dtype=bool)
    for row, chosen in zip(values, mask, strict=True):
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        chosen[order[:keep]] = True
    return mask


class Reference:
    """y = W x + s B A x on squared loss, plain SGD, RoseLoRA's steps 1 to 5, all in float64."""

    def __init__(self, weight, A, B, scaling, lr, tau, beta, start, end, first="zero", clamp=None, rule=math.floor):
        self.W, self.A, self.B, self.s, self.lr = weight, A.copy(), B.copy(), scaling, lr
        self.tau, self.beta, self.start, self.end = tau, beta, start, end
        self.first, self.clamp, self.rule = first, clamp, rule
        self.avg_A = self.avg_B = None
        self.t = 0

    def step(self, x, y):
        self.t += 1
        error = x @ (self.W + self.s * self.B @ self.A).T - y
        G = 2 * error / error.size
        dW = G.T @ x
        dA, dB = self.s * self.B.T @ dW, self.s * dW @ self.A.T
        I_A, I_B = np.abs(self.A * dA), np.abs(self.B * dB)
        self.first_score = (I_A.copy(), I_B.copy()) if self.t == 1 else self.first_score
        if self.avg_A is None:
            factor = 1.0 if self.first == "gradient" else 1 - self.beta
            self.avg_A, self.avg_B = factor * I_A, factor * I_B
        else:
            self.avg_A = self.beta * self.avg_A + (1 - self.beta) * I_A
            self.avg_B = self.beta * self.avg_B + (1 - self.beta) * I_B
        self.A -= self.lr * dA
        self.B -= self.lr * dB
        share = reference_share(self.t, self.start, self.end, self.tau)
        if share < 1:
            keep = lambda n: max(1, self.rule(share * n + 1e-9))  # noqa: E731
            self.A *= reference_top(self.avg_A, keep(self.A.shape[1]))
            self.B *= reference_top(self.avg_B.T, keep(self.B.shape[0])).T
            if self.clamp:
                self.A, self.B = self.A.clip(-self.clamp, self.clamp), self.B.clip(-self.clamp, self.clamp)


class Loop:
    """The same with our adapter and callback, driven by hand at the callback's two moments."""

    def __init__(self, d_in=12, d_out=9, lr=0.3, seed=0, total=TOTAL, dtype=torch.float64, **settings):
        torch.manual_seed(seed)
        self.method = RoseLoRA(**{"rank": 3, "alpha": 6.0, "sparsity": 0.7, **settings})
        self.model = nn.Sequential(nn.Linear(d_in, d_out, dtype=dtype))
        inject(self.model, self.method, seed=seed)
        (self.path, self.adapter), *_ = trainable_adapters(self.model).items()
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        (self.schedule,) = self.method.callbacks()
        self.schedule.on_start(total, trainable_adapters(self.model))
        self.t = 0

    def step(self, x, y, micro_batches: int = 1) -> None:
        self.t += 1
        self.optimizer.zero_grad()
        for part, target in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            (nn.functional.mse_loss(self.model(part), target) / micro_batches).backward()
        self.schedule.on_gradients(self.t, {})
        self.optimizer.step()
        with torch.no_grad():
            self.schedule.on_stepped(self.t, {})

    def average(self, side: str) -> torch.Tensor:
        return self.schedule.state_dict()["averages"][f"{self.path}.lora_{side}"]


def data(steps=TOTAL, d_in=12, d_out=9, n=8) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(n, d_in, generator=generator, dtype=torch.float64)
        yield x, torch.randn(n, d_out, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({}, {}),
        ({"first_score": "gradient"}, {"first": "gradient"}),
        ({"clamp": 0.05}, {"clamp": 0.05}),
        ({"keep_rule": "ceil"}, {"rule": lambda v: math.ceil(v - 2e-9)}),
        ({"beta": 0.0}, {"beta": 0.0}),
    ],
)
def test_training_equals_a_dense_float64_reference(settings, reference):
    loop = Loop(**settings)
    start = {"scaling": 2.0, "lr": 0.3, "tau": 0.3, "beta": 0.8, "start": 2, "end": 16} | reference
    weight, bias = loop.model[0].base.weight.detach().numpy(), loop.model[0].base.bias.detach().numpy()
    dense = Reference(weight, loop.adapter.lora_A.detach().numpy(), loop.adapter.lora_B.detach().numpy(), **start)
    for x, y in data():
        loop.step(x, y)
        dense.step(x.numpy(), y.numpy() - bias)
        np.testing.assert_allclose(loop.adapter.lora_A.detach(), dense.A, atol=1e-12)
        np.testing.assert_allclose(loop.adapter.lora_B.detach(), dense.B, atol=1e-12)
        np.testing.assert_allclose(loop.average("A"), dense.avg_A, atol=1e-12)
        np.testing.assert_allclose(loop.average("B"), dense.avg_B, atol=1e-12)


def test_output_at_the_start_is_the_base_models():
    x = torch.randn(4, 12, dtype=torch.float64)
    torch.manual_seed(0)
    plain = nn.Linear(12, 9, dtype=torch.float64)
    assert torch.equal(Loop(seed=0).model(x), plain(x))


def test_until_the_start_it_is_plain_lora_bit_for_bit():
    rose, plain = Loop(start=6, end=16), Loop(start=6, end=16)
    for t, (x, y) in enumerate(data(7), start=1):
        rose.step(x, y)
        plain.optimizer.zero_grad()
        nn.functional.mse_loss(plain.model(x), y).backward()
        plain.optimizer.step()
        same = torch.equal(rose.adapter.lora_A, plain.adapter.lora_A)
        assert same == (t <= 6)


@pytest.mark.parametrize("rule", ["floor", "ceil", "official"])
def test_each_row_of_A_and_column_of_B_keeps_the_count(rule):
    loop = Loop(keep_rule=rule)
    for t, (x, y) in enumerate(data(), start=1):
        loop.step(x, y)
        share = reference_share(t, 2, 16, 1 - 0.7)
        for rows in (loop.adapter.lora_A, loop.adapter.lora_B.T):
            expected = rows.shape[1] if share == 1 else keep_count(share, rows.shape[1], rule)
            if t > 1:
                assert (rows != 0).sum(1).tolist() == [expected] * rows.shape[0]


def test_the_kept_set_is_the_top_of_the_average():
    loop = Loop()
    for x, y in data():
        loop.step(x, y)
        keep_A = int((loop.adapter.lora_A[0] != 0).sum())
        if keep_A < 12:
            expected = reference_top(loop.average("A").numpy(), keep_A)
            assert torch.equal(loop.adapter.mask_A, torch.from_numpy(expected))


def test_density_of_the_product_stays_below_the_bound():
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        A = torch.randn(4, 30, generator=generator) * (torch.rand(4, 30, generator=generator) < 0.2)
        B = torch.randn(25, 4, generator=generator) * (torch.rand(25, 4, generator=generator) < 0.3)
        zeros = lambda v: float((v == 0).double().mean())  # noqa: E731
        paper = 1 + sum(zeros(A[i]) + zeros(B[:, i]) - zeros(A[i]) * zeros(B[:, i]) for i in range(4)) - 4
        assert zeros(B @ A) >= max(0.0, paper) - 1e-12
        assert density_bound(A, B) == pytest.approx(min(1.0, 1 - paper), abs=1e-12)
        assert density(A, B) <= density_bound(A, B) + 1e-12
        assert density(A, B) >= 1 - zeros(B @ A) - 1e-12


def test_density_equals_the_bound_for_disjoint_supports():
    A, B = torch.zeros(3, 12), torch.zeros(9, 3)
    for i in range(3):
        A[i, 4 * i : 4 * i + 2] = 1.0
        B[3 * i : 3 * i + 2, i] = 2.0
    assert density(A, B) == pytest.approx(density_bound(A, B)) == pytest.approx(3 * 4 / 108)


def test_supports_are_nested_and_a_pruned_average_decays_by_beta():
    loop = Loop()
    masks, averages = [], []
    for x, y in data():
        loop.step(x, y)
        masks.append(loop.adapter.mask_A.clone())
        averages.append(loop.average("A").clone())
    for t in range(1, TOTAL):
        assert not (masks[t] & ~masks[t - 1]).any()
        gone = ~masks[t - 1]
        torch.testing.assert_close(averages[t][gone], 0.8 * averages[t - 1][gone], rtol=1e-12, atol=0)
    assert (~masks[-1]).sum() > 0


def test_the_first_sensitivity_is_zero_everywhere():
    loop = Loop()
    loop.step(*next(data()))
    assert not loop.average("A").any()
    assert not loop.average("B").any()


def test_merging_is_exact_and_touches_nothing_outside_the_support():
    loop = Loop()
    for x, y in data():
        loop.step(x, y)
    x = torch.randn(5, 12, dtype=torch.float64)
    before, weight = loop.model(x), loop.model[0].base.weight.clone()
    merge(loop.model)
    torch.testing.assert_close(loop.model(x), before, atol=1e-12, rtol=0)
    changed = loop.model[0].base.weight != weight
    touched = ((loop.adapter.lora_B != 0).double() @ (loop.adapter.lora_A != 0).double()) > 0
    assert not (changed & ~touched).any()
    assert changed.any()
    unmerge(loop.model)
    assert torch.equal(loop.model[0].base.weight, weight)


def test_base_never_moves():
    loop = Loop()
    weight, bias = loop.model[0].base.weight.clone(), loop.model[0].base.bias.clone()
    for x, y in data():
        loop.step(x, y)
    assert torch.equal(loop.model[0].base.weight, weight)
    assert torch.equal(loop.model[0].base.bias, bias)


def test_row_masks_of_A_do_not_depend_on_B():
    loops = [Loop(), Loop()]
    for loop, other_B in zip(loops, (False, True), strict=True):
        for x, y in data(5):
            loop.step(x, y)
        state = loop.schedule.state_dict()
        name = f"{loop.path}.lora_B"
        if other_B:
            state["averages"][name] = torch.rand_like(state["averages"][name])
        loop.schedule.load_state_dict(state)
        loop.schedule.on_start(TOTAL, trainable_adapters(loop.model))
        with torch.no_grad():
            loop.schedule.on_stepped(12, {})
    assert torch.equal(loops[0].adapter.mask_A, loops[1].adapter.mask_A)
    assert not torch.equal(loops[0].adapter.mask_B, loops[1].adapter.mask_B)


def test_two_half_batches_equal_one_batch():
    whole, halves = Loop(), Loop()
    for x, y in data():
        whole.step(x, y)
        halves.step(x, y, micro_batches=2)
    assert torch.equal(whole.adapter.mask_A, halves.adapter.mask_A)
    assert torch.equal(whole.adapter.mask_B, halves.adapter.mask_B)
    torch.testing.assert_close(whole.adapter.lora_B, halves.adapter.lora_B, atol=1e-12, rtol=0)


def test_resuming_mid_ramp_equals_not_having_stopped():
    straight = Loop()
    for t, (x, y) in enumerate(data(), start=1):
        straight.step(x, y)
        if t == 9:
            saved = copy.deepcopy((straight.model.state_dict(), straight.schedule.state_dict()))
    resumed = Loop(seed=5)
    resumed.model.load_state_dict(saved[0])
    resumed.schedule.load_state_dict(saved[1])
    resumed.schedule.on_start(TOTAL, trainable_adapters(resumed.model))
    resumed.t = 9
    for x, y in list(data())[9:]:
        resumed.step(x, y)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_clamp_bounds_every_entry_once_pruning_has_begun():
    loop = Loop(clamp=3e-3)
    for t, (x, y) in enumerate(data(), start=1):
        loop.step(x, y)
        largest = max(float(p.detach().abs().max()) for p in (loop.adapter.lora_A, loop.adapter.lora_B))
        assert (largest <= 3e-3) == (t > 2)


def test_nothing_in_the_average_requires_grad():
    loop = Loop()
    for x, y in data(4):
        loop.step(x, y)
    assert not any(a.requires_grad or a.grad_fn for a in loop.schedule.state_dict()["averages"].values())


def test_bfloat16_sensitivities_are_kept_in_float32():
    model = nn.Sequential(nn.Linear(6, 5)).to(torch.bfloat16)
    inject(model, RoseLoRA(rank=2), seed=0)
    adapter = next(iter(trainable_adapters(model).values())).to(torch.bfloat16)
    schedule = SparsitySchedule()
    schedule.on_start(10, {"0": adapter})
    for parameter in adapter.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    schedule.on_gradients(1, {})
    assert {a.dtype for a in schedule.state_dict()["averages"].values()} == {torch.float32}


def test_report_counts_survivors_and_density():
    loop = Loop()
    for x, y in data():
        loop.step(x, y)
    facts = survey(adapters_named(loop.model, "default"))
    A, B = loop.adapter.lora_A.detach(), loop.adapter.lora_B.detach()
    assert facts["surviving_A"] == int((A != 0).sum())
    assert facts["surviving_B"] == int((B != 0).sum())
    assert facts["entries_A"] + facts["entries_B"] == A.numel() + B.numel()
    assert facts["density"] <= facts["density_bound"]
    assert facts == loop.method.report(adapters_named(loop.model, "default"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sparsity": 1.2},
            r"RoseLoRA.sparsity is 1.2; it must lie in \[0, 1\). Fraction of entries set to zero, so 0.9",
        ),
        ({"sparsity": -0.1}, r"RoseLoRA.sparsity is -0.1; it must lie in \[0, 1\)"),
        (
            {"keep_rule": "flor"},
            r'RoseLoRA.keep_rule is "flor". Did you mean "floor"\? It takes: "floor", "ceil", "official"',
        ),
        ({"rank": 2.5}, r"RoseLoRA.rank is 2.5; it must be a whole number"),
        ({"rank": 0}, r"RoseLoRA.rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, r"RoseLoRA.alpha is 0.0; it must be above 0"),
        ({"beta": 1.0}, r"RoseLoRA.beta is 1.0; it must lie in \[0, 1\)"),
        ({"dropout": 1.0}, r"RoseLoRA.dropout is 1.0; it must lie in \[0, 1\)"),
        ({"start": 0.5, "end": 0.5}, r"RoseLoRA.end is 0.5; it must come after start, which is 0.5"),
        ({"start": 30, "end": 20}, r"RoseLoRA.end is 20; it must come after start, which is 30"),
        ({"start": -0.1}, r"RoseLoRA.start is -0.1; it must be at least 0"),
        ({"clamp": 0.0}, r"RoseLoRA.clamp is 0.0; it must be above 0, or null"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        RoseLoRA(**settings)
