"""Ratios and errors of values that stand for one another, against tensors at hand."""

from __future__ import annotations

import pytest
import torch

from lora_lightning.adapters.base import RunningSum
from lora_lightning.adapters.nearness import approximate, error, norm, observe, ratio
from lora_lightning.errors import AdapterStateError


def randn(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def means(x, others, u, v, parts=1):
    sums = RunningSum()
    for k in range(parts):
        rows = slice(k * len(x) // parts, (k + 1) * len(x) // parts)
        observe(sums, x[rows], [norm(o[rows]) for o in others], u[rows], None if v is None else v[rows])
    return sums.take()


def test_the_best_ratio_is_that_of_least_squares_and_its_error_the_residual():
    x, u, v = randn(12, 5), randn(12, 3, seed=1), randn(12, 3, seed=2)
    found = means(x, [x], u, v, parts=3)
    c = float(torch.linalg.lstsq(u.reshape(-1, 1), v.reshape(-1, 1)).solution)
    assert ratio(found, "fit") == pytest.approx(c, rel=1e-5)
    for other in (c, 0.0, 1.3):
        assert error(found, other) == pytest.approx(float((v - other * u).norm() / (u + v).norm()), rel=1e-4)
    assert error(found, c) < error(found, c + 0.1)


def test_the_ratio_of_inputs_is_of_mean_norms_of_tokens_and_of_any_batches():
    x, y, z = randn(12, 5), 3 * randn(12, 5, seed=1), randn(12, 5, seed=2)
    expected = float((y.norm(dim=-1) + z.norm(dim=-1)).mean() / x.norm(dim=-1).mean())
    for parts in (1, 2, 12):
        assert ratio(means(x, [y, z], x, y, parts), "inputs") == pytest.approx(expected, rel=1e-6)


def test_without_others_nothing_is_added_and_nothing_lost():
    A, B = randn(2, 5), randn(3, 2)
    found = approximate(means(randn(4, 5), [], randn(4, 2), None), "inputs", A, B)
    assert torch.equal(found.B @ found.A, B @ A)
    assert found.error == 0.0
    with pytest.raises(AdapterStateError, match="no training step has been measured"):
        approximate(torch.zeros(5), "fit", A, B)
