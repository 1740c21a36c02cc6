"""Which entries survive: the ramp, kept counts, exact top-k by row, against the definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from lora_lightning.callbacks.keep_masks import keep_best, keep_count, keep_top, kept_density


def test_ramp_ends_and_midpoint():
    shares = [kept_density(t, 4, 24, 0.2) for t in range(1, 31)]
    assert shares[:4] == [1.0] * 4
    assert shares[23:] == [0.2] * 7
    assert all(later <= earlier for earlier, later in itertools.pairwise(shares))
    assert kept_density(14, 4, 24, 0.2) == pytest.approx(0.2 + 0.8 / 8, abs=1e-15)
    wide = [kept_density(4 + k, 4, 4 + 100_000, 0.2) for k in (0, 1, 99_999, 100_000)]
    assert wide[0] - wide[1] < 1e-4
    assert wide[2] - wide[3] < 1e-4


def test_rows_are_ranked_on_their_own():
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(3, 10, generator=generator)
    scaled = scores * torch.tensor([[1.0], [100.0], [1.0]])
    assert torch.equal(keep_top(scores, 4), keep_top(scaled, 4))


def test_ties_go_to_the_lowest_index():
    assert keep_top(torch.zeros(2, 5), 2).tolist() == [[True, True, False, False, False]] * 2
    assert keep_top(torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]), 3).tolist() == [[True, True, False, True, False]]


@pytest.mark.parametrize(
    ("n", "tau", "kept"), [(12, 0.05, 2), (4096, 0.05, 206), (100, 0.1, 11), (10, 0.25, 4), (6, 0.9, 6)]
)
def test_official_rule_is_the_released_codes_threshold(n, tau, kept):
    """Entries strictly below the k-th smallest go, k = int(n (1 - tau)); k = 0, an error there, prunes nothing."""
    values = torch.randperm(n, generator=torch.Generator().manual_seed(n)).double()
    k = int(n * (1 - tau) + 1e-9)
    survivors = n if k == 0 else int((values >= values.kthvalue(k).values).sum())
    assert keep_count(tau, n, "official") == survivors == kept


@pytest.mark.parametrize(
    ("n", "tau", "floor", "ceil"), [(12, 0.05, 1, 1), (100, 0.29, 29, 29), (10, 0.25, 2, 3), (3, 0.01, 1, 1)]
)
def test_floor_and_ceil_rules(n, tau, floor, ceil):
    assert (keep_count(tau, n, "floor"), keep_count(tau, n, "ceil")) == (floor, ceil)


def test_the_best_of_several_tensors_are_chosen_together_and_the_first_of_equal_ones():
    scores = {"a": torch.tensor([[3.0, 1.0], [2.0, 5.0]]), "b": torch.tensor([2.0, 4.0])}
    masks = keep_best(scores, 4)
    assert masks["a"].tolist() == [[True, False], [True, True]]
    assert masks["b"].tolist() == [False, True]
    assert all(mask.all() for mask in keep_best(scores, 6).values())
