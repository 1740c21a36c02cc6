"""Stacked pairs and factorised Grams against loops of solves, and what a pair optimizer refuses."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

from ll_lora import LoRA
from lora_lightning import inject
from lora_lightning.adapters.base import FactorPair
from lora_lightning.errors import SettingsError, TrainingError
from lora_lightning.optim.directions import adam, descend
from lora_lightning.optim.groups import build_optimizer, factor_pairs
from lora_lightning.optim.pair_optimizer import PairOptimizer, check_settings, one_of
from lora_lightning.optim.pairs import RAISES, damped_cholesky, factorise, gram_A, gram_B, stack_pairs


def pair(r, d_in, d_out, lead=(), seed=0, dtype=torch.float32, name="p"):
    g = torch.Generator().manual_seed(seed)
    A = nn.Parameter(torch.randn(*lead, r, d_in, generator=g, dtype=torch.float64).to(dtype))
    B = nn.Parameter(torch.randn(*lead, d_out, r, generator=g, dtype=torch.float64).to(dtype))
    return FactorPair(name, A, B, 2.0)


def test_pairs_are_stacked_by_shape_and_come_back():
    pairs = [pair(2, 5, 4), pair(3, 5, 4, seed=1), pair(2, 5, 4, (3,), seed=2), pair(2, 4, 5, seed=3)]
    stacks = stack_pairs(pairs)
    assert [len(stack.pairs) for stack in stacks] == [2, 1, 1]
    first = stacks[0]
    assert first.A.shape == (4, 2, 5)
    assert first.A.dtype == torch.float64
    assert first.scaling.shape == (4, 1, 1)
    for factor, back in zip(first.factors("B"), first.split(first.B, first.factors("B")), strict=True):
        assert torch.equal(factor, back)
        assert back.dtype == factor.dtype
    assert not first.grad_A.any()
    pairs[2].lora_A.grad = torch.ones_like(pairs[2].lora_A)
    assert first.grad_A.sum((1, 2)).tolist() == [0.0, 10.0, 10.0, 10.0]


def test_batched_cholesky_equals_a_loop_of_solves():
    pairs = [pair(2, 6, 5), pair(3, 6, 5, (2,), seed=1), pair(2, 7, 5, seed=2), pair(3, 6, 5, seed=3)]
    stacks = stack_pairs(pairs)
    for gram, side in ((gram_A, "A"), (gram_B, "B")):
        stacked = [stack.join(stack.factors(side)) for stack in stacks]
        for x, factorised in zip(stacked, factorise([gram(x) for x in stacked], 1e-3), strict=True):
            right = torch.randn(x.shape[0], gram(x).shape[-1], 9, dtype=torch.float64)
            for one, G, found in zip(right, gram(x), factorised.solve(right), strict=True):
                expected = torch.linalg.inv(G + 1e-3 * torch.eye(len(G), dtype=torch.float64)) @ one
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(factorised.solve_right(right.mT), factorised.solve(right).mT)
            assert not factorised.raises.any()


def test_one_factorisation_a_rank_however_many_layers_and_experts(monkeypatch):
    calls = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda A: calls.append(tuple(A.shape)) or original(A))
    layers = [pair(r, d_in, 5, lead, seed) for seed, (r, d_in, lead) in enumerate([(2, 6, ()), (3, 6, (2,))] * 10)]
    layers += [pair(2, 9, 7, (), 30 + seed) for seed in range(10)]
    stacks = stack_pairs(layers)
    factorise(
        [gram(stack.join(stack.factors(side))) for stack in stacks for gram, side in ((gram_A, "A"), (gram_B, "B"))],
        1e-3,
    )
    assert sorted(calls) == [(40, 2, 2), (40, 3, 3)]  # both sides of 20 pairs, and of 10 with two experts each


def test_a_singular_gram_gets_the_smallest_sufficient_tenfold_damping_and_its_neighbours_none():
    good = torch.eye(2, dtype=torch.float64)
    bad = torch.tensor([[1.0, 0.0], [0.0, -3e-6]], dtype=torch.float64)  # a Gram spoilt by rounding
    L, raises = damped_cholesky(torch.stack([good, bad]), 1e-8)
    assert raises.tolist() == [0, 3]
    torch.testing.assert_close(L[0] @ L[0].T, good * (1 + 1e-8), rtol=1e-14, atol=0)
    torch.testing.assert_close(L[1] @ L[1].T, bad + 1e-5 * good, rtol=1e-12, atol=1e-16)


def test_without_damping_a_zero_gram_is_mended_and_a_lost_one_is_an_error():
    L, raises = damped_cholesky(torch.zeros(1, 3, 3, dtype=torch.float64), 0.0)
    assert torch.isfinite(L).all()
    assert raises.tolist() == [1]
    with pytest.raises(TrainingError, match="1 Gram matrices of factor pairs have no Cholesky factor"):
        damped_cholesky(torch.full((1, 2, 2), float("nan"), dtype=torch.float64), 1e-3)
    hopeless = -torch.eye(2, dtype=torch.float64)[None] * 10.0 ** (RAISES + 1)
    with pytest.raises(TrainingError, match="not finite"):
        damped_cholesky(hopeless, 1.0)


# -- the element-wise half ---------------------------------------------------------------------------------------------


class Recorder(PairOptimizer):
    """Adam on raw gradients, pairs or not."""

    def __init__(self, params, lr=0.1, **settings):
        super().__init__(
            params, {"lr": lr, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}, {"order": "x", **settings}
        )
        check_settings(self)

    def take_step(self):
        found = {
            f: f.grad for stack in stack_pairs(self.with_gradient("A", "B")) for s in "AB" for f in stack.factors(s)
        }
        descend(self, adam(self, {**found, **self.plain_gradients()}))


def test_adam_and_descent_equal_torch_adamw():
    torch.manual_seed(0)
    shapes = [(3, 2), (4,)]
    ours, theirs = ([nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    optimizer = Recorder([{"params": ours[:1]}, {"params": ours[1:], "betas": (0.5, 0.9)}])
    reference = torch.optim.AdamW(
        [{"params": theirs[:1]}, {"params": theirs[1:], "betas": (0.5, 0.9)}],
        lr=0.1,
        betas=(0.8, 0.95),
        eps=1e-3,
        weight_decay=0.1,
    )
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn(a.shape)
        if step == 2:
            ours[1].grad = theirs[1].grad = None
        with torch.no_grad():
            optimizer.take_step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_adam_without_bias_correction():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Recorder([p])
    found = adam(optimizer, {p: torch.tensor([2.0], dtype=torch.float64)}, bias_correction=False)
    assert float(found[p]) == pytest.approx(0.2 * 2 / ((0.05 * 4) ** 0.5 + 1e-3))


# -- what a pair optimizer refuses -------------------------------------------------------------------------------------


def model(**settings):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    inject(net, LoRA(rank=2, **settings), ["0"], also_train=["1"])
    return net


def test_a_step_without_pairs_names_the_fix():
    net = model()
    optimizer = Recorder([p for p in net.parameters() if p.requires_grad])
    with pytest.raises(
        TrainingError, match=r"Recorder does not know the factor pairs; call optimizer.bind_pairs\(lora"
    ):
        optimizer.step()
    optimizer.bind_pairs(factor_pairs(net))
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()


def test_no_pairs_at_all():
    with pytest.raises(TrainingError, match="Recorder needs factor pairs, and nothing that trains is one"):
        Recorder(nn.Linear(2, 2).parameters()).bind_pairs(())
    with pytest.raises(TrainingError, match="nothing that trains is one"):
        Recorder(nn.Linear(2, 2).parameters()).bind_pairs(factor_pairs(model()))


def test_pairs_that_cannot_be_stepped():
    one = pair(2, 4, 4)
    shared = FactorPair("q", one.lora_A, pair(2, 4, 4, seed=1).lora_B, 1.0)
    with pytest.raises(TrainingError, match='the factor pair "q" shares a factor with another pair'):
        Recorder([one.lora_A, one.lora_B]).bind_pairs((one, shared))
    half = pair(2, 4, 4, dtype=torch.bfloat16)
    with pytest.raises(TrainingError, match='the factor pair "p" is in half precision'):
        Recorder([half.lora_A, half.lora_B]).bind_pairs((half,))


@pytest.mark.parametrize(
    ("trains", "train", "message"),
    [
        ("both", "B", "trains B alone; it needs both sides"),
        ("both", "A", "trains A alone; it needs both sides"),
        ("B", "both", "trains A; .* so set the method's option train: B"),
        ("B", "A", "trains A; .*option train: B"),
    ],
)
def test_sides_that_must_train(trains, train, message, monkeypatch):
    monkeypatch.setattr(Recorder, "trains", trains)
    with pytest.raises(TrainingError, match=message):
        build_optimizer(model(train=train), Recorder)
    build_optimizer(model(train=trains), Recorder)


def test_a_damped_pair_is_counted_under_its_parameter_and_warned_of_once():
    one = pair(2, 4, 4)
    optimizer = Recorder([one.lora_A, one.lora_B])
    optimizer.bind_pairs((one,))
    (stack,) = stack_pairs((one,))
    (singular,) = factorise([torch.zeros(1, 2, 2, dtype=torch.float64)], 0.0)
    assert optimizer.report() == {}
    with pytest.warns(UserWarning, match='Recorder: factors of the pair "p" are so near singular'):
        optimizer.count_damped(stack, singular, "A")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.count_damped(stack, singular, "A")
    assert optimizer.report() == {"p": 2}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = Recorder([one.lora_A, one.lora_B])
    again.load_state_dict(torch.load(file, weights_only=True))
    again.bind_pairs((one,))
    assert again.report() == {"p": 2}


def test_the_closure_runs_once_with_gradients_on():
    net = model()
    optimizer = build_optimizer(net, Recorder)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = net(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert float(loss.detach()) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1}, "Recorder.lr is -1; it must be at least 0"),
        ({"damping": -1e-3}, "Recorder.damping is -0.001; it must be at least 0"),
        ({"lr": float("nan")}, "Recorder.lr is nan"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        Recorder(model().parameters(), **settings)
    with pytest.raises(SettingsError, match=f"^{message}"):
        build_optimizer(model(), lambda groups: Recorder(groups, **settings))


def test_a_choice():
    optimizer = Recorder(model().parameters())
    with pytest.raises(SettingsError, match=r"Recorder.order is 'x'; it takes y, z\."):
        check_settings(optimizer, {"order": one_of("y", "z")})
