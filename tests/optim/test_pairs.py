"""Stacked pairs and factorised Grams against loops of solves, and what a pair optimizer refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_lightning.adapters.base import FactorPair
from lora_lightning.errors import TrainingError
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


# -- what a pair optimizer refuses -------------------------------------------------------------------------------------
