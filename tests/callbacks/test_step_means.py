"""Means over the micro-batches of a step, and what a save in the middle of one holds."""

from __future__ import annotations

import torch

from lora_lightning.adapters.base import RunningSum
from lora_lightning.callbacks.step_means import StepMeans


def means(names=("a", "b")):
    return StepMeans({name: RunningSum() for name in names}, dict.fromkeys(names, 2), "cpu")


def test_a_mean_is_over_all_that_was_added_and_empties_the_sums():
    own = means()
    own.sums["a"].add(torch.tensor([1.0, 2.0]), 1)
    own.sums["a"].add(torch.tensor([5.0, 7.0]), 3)
    found = own.take()
    assert found.keys() == {"a"}
    assert found["a"].tolist() == [1.5, 2.25]
    assert own.take() == {}


def test_a_window_that_is_open_goes_on_after_loading():
    own, other = means(), means()
    own.sums["b"].add(torch.tensor([1.0, 2.0]), 2)
    other.sums["a"].add(torch.tensor([9.0, 9.0]), 1)  # of another run
    other.load(own.state(), rank=0)
    other.sums["b"].add(torch.tensor([3.0, 2.0]), 2)
    assert {name: value.tolist() for name, value in other.take().items()} == {"b": [1.0, 1.0]}


def test_what_is_forgotten_is_in_no_mean():
    own = means()
    own.sums["a"].add(torch.full((2,), torch.inf), 1)
    own.forget()
    assert own.take() == {}
