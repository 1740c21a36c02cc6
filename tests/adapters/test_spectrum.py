"""Spectra of updates against numpy's singular values of the dense matrix, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_lightning.adapters.spectrum import dense_spectrum, effective_rank, factored_spectrum, factored_svd


def reference(delta, fraction):
    """k, |D|^2 / s1^2, |D| and s1 by the definition."""
    values = np.linalg.svd(delta, compute_uv=False)
    held = np.cumsum(values**2) / np.sum(values**2)
    k = next(k for k in range(1, len(values) + 1) if held[k - 1] >= fraction)
    return k, np.sum(values**2) / values[0] ** 2, np.linalg.norm(delta), values[0]


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5)])
def test_a_dense_update(shape, fraction):
    delta = drawn(*shape) * torch.logspace(0, -2, shape[1], dtype=torch.float64)
    found = dense_spectrum(delta, fraction)
    expected = reference(delta.numpy(), fraction)
    assert (found.effective_rank, found.stable_rank, found.norm, found.largest) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_factors_give_the_spectrum_of_their_product(rank):
    """Wider pairs than the layer, too; and never more than the rank."""
    A, B = drawn(rank, 6), drawn(8, rank, seed=1)
    found = factored_spectrum(A, B, 0.9)
    expected = reference((B @ A).numpy(), 0.9)
    assert (found.effective_rank, found.stable_rank, found.norm, found.largest) == pytest.approx(expected, rel=1e-10)
    assert found.effective_rank <= rank
    U, S, Vh = factored_svd(A, B)
    torch.testing.assert_close(U * S @ Vh, B @ A, rtol=0, atol=1e-12)
    values = np.linalg.svd((B @ A).numpy(), compute_uv=False)[: len(S)]
    np.testing.assert_allclose(S.numpy(), values, atol=1e-6)


def test_stacked_matrices_have_their_mean_rank():
    A, B = drawn(3, 2, 6), drawn(3, 5, 2, seed=1)
    parts = [reference((b @ a).numpy(), 0.9) for a, b in zip(A, B, strict=True)]
    for found in (factored_spectrum(A, B), dense_spectrum(B @ A)):
        assert found.effective_rank == pytest.approx(np.mean([part[0] for part in parts]))
        assert found.stable_rank == pytest.approx(np.mean([part[1] for part in parts]))
        assert found.norm == pytest.approx(np.sqrt(np.sum([part[2] ** 2 for part in parts])))
        assert found.largest == pytest.approx(max(part[3] for part in parts))


def test_an_update_of_zero_has_no_rank():
    for found in (factored_spectrum(drawn(2, 4), torch.zeros(3, 2)), dense_spectrum(torch.zeros(3, 4))):
        assert (found.effective_rank, found.stable_rank, found.norm, found.largest) == (0, 0, 0, 0)


def test_equal_values_are_counted_exactly():
    """Of ten equal ones nine hold 90 %, whatever the rounding of their sum."""
    assert effective_rank(torch.full((10,), 0.1, dtype=torch.float64), 0.9) == 9
    assert effective_rank(torch.ones(10, dtype=torch.float64), 1.0) == 10
