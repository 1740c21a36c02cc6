"""Entries of a weight by their places: which are chosen, what is kept of equal ones, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.adapters.weight_entries import EntriesAdapter, kept_mask, number_below
from lora_lightning.errors import SettingsError


@pytest.mark.parametrize("removed", [0, 1, 5, 7, 8])
def test_of_equal_scores_the_first_entries_go(removed):
    scores = torch.tensor([[3.0, 1.0, 1.0, 2.0], [1.0, 0.0, 3.0, 1.0]])
    order = [5, 1, 2, 4, 7, 3, 0, 6]
    kept = kept_mask(scores, torch.tensor(removed)).flatten()
    assert [i for i in range(8) if not kept[i]] == sorted(order[:removed])


@pytest.mark.parametrize("entries", [1, 7, 30])
def test_the_smallest_entries_are_taken_in_the_order_of_their_places(entries):
    base = core_base_layer(nn.Linear(6, 5).double())
    adapter, W = EntriesAdapter(base, entries, None), base.weight().detach().flatten()
    places = sorted(range(30), key=lambda i: abs(float(W[i])))[:entries]
    assert adapter.indices.tolist() == sorted(places)
    assert torch.equal(adapter.values.detach(), W[sorted(places)])
    assert torch.equal(adapter.placed(adapter.origin).flatten()[places], W[places])
    assert int(adapter.placed(adapter.origin).count_nonzero()) == entries
    assert number_below(base, float(adapter.limit)) == entries


def test_more_entries_than_the_layer_has():
    with pytest.raises(SettingsError, match=r"31 of the layer's 30 entries would train"):
        EntriesAdapter(core_base_layer(nn.Linear(6, 5)), 31, None)
