from __future__ import annotations

import math

import pytest

from lora_lightning.cli.compare.search import MOST_MOVES, best_rate, is_edge, next_rates


def tried(value, start=1e-3, higher_is_better=True):
    """Every rate that is tried, with its value, until none is asked for."""
    done = {}
    while rates := next_rates(start, done, higher_is_better):
        assert not set(rates) & set(done)
        done |= {rate: value(rate) for rate in rates}
    return done


@pytest.mark.parametrize("best", [1e-5, 2e-4, 1e-3, 5e-3, 0.1])
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_grid_moves_until_the_best_lies_inside_it(best, higher_is_better):
    sign = -1 if higher_is_better else 1
    done = tried(lambda rate: sign * math.log(rate / best) ** 2, higher_is_better=higher_is_better)
    found = best_rate(done, higher_is_better)
    assert abs(math.log10(found / best)) <= 0.26  # half a step of the fine grid, rounded
    assert not is_edge(done, higher_is_better)
    assert len(done) <= 5 + MOST_MOVES


def test_a_best_rate_inside_the_first_three_takes_five_runs():
    done = tried(lambda rate: -abs(math.log10(rate / 1e-3)))
    assert sorted(done) == [3.16e-4, 5.62e-4, 1e-3, 1.78e-3, 3.16e-3]


def test_what_gets_better_without_end_ends_on_an_edge():
    done = tried(lambda rate: rate)
    assert len(done) == 3 + MOST_MOVES
    assert is_edge(done, True)
    assert best_rate(done, True) == max(done)


def test_rates_that_fail_count_as_worst():
    done = tried(lambda rate: math.nan if rate > 2e-4 else -rate)
    assert best_rate(done, True) < 2e-4


def test_where_every_rate_fails_lower_ones_are_tried_and_then_none():
    done = tried(lambda rate: math.nan)
    assert len(done) == 3 + MOST_MOVES
    assert min(done) < 1e-5
    assert best_rate(done, True) is None


def test_equal_values_take_the_lowest_rate():
    assert best_rate({1e-3: 0.5, 1e-4: 0.5, 1e-2: 0.4}, True) == 1e-4
