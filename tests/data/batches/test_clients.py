"""Rows of clients: who has which, and that turns go through each client's stream without a gap."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lora_lightning.data.batches.clients import ClientSampler, client_parts
from lora_lightning.errors import DataError

ROWS = list(range(50))


@pytest.mark.parametrize("options", [{}, {"labels": [row % 3 for row in ROWS], "concentration": 0.7}])
def test_every_row_belongs_to_one_client(options):
    parts = client_parts(50, 3, seed=1, **options)
    assert sorted(torch.cat(parts).tolist()) == ROWS
    again = client_parts(50, 3, seed=1, **options)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    other = client_parts(50, 3, seed=2, **options)
    assert not all(torch.equal(a, b) for a, b in zip(parts, other, strict=True))


def test_even_parts_differ_by_one_row_at_most():
    assert sorted(len(part) for part in client_parts(50, 3, seed=0)) == [16, 17, 17]


def test_a_small_concentration_gives_a_class_to_few_clients():
    labels = [row % 4 for row in range(4000)]

    def largest(concentration):
        parts = client_parts(4000, 4, 0, labels, concentration)
        return [max(Counter(labels[row] for row in part.tolist()).get(c, 0) for part in parts) / 1000 for c in range(4)]

    assert min(largest(1000.0)) < 0.3
    assert max(largest(0.05)) > 0.9


def test_a_client_without_rows_is_refused():
    with pytest.raises(DataError, match=r"client 2 of 4 would have none of the 2 training rows; take fewer clients"):
        client_parts(2, 4, seed=0)


def turns(sampler, size):
    rows = list(sampler)
    assert len(rows) == len(sampler)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def test_turns_follow_each_other_and_streams_have_no_gap():
    parts = client_parts(50, 3, seed=1)
    sampler = ClientSampler(ROWS, parts, batch_size=2, turn=3, seed=5, num_replicas=1, rank=0)
    assert sampler.rounds == 2  # of 18 rows
    seen = {client: [] for client in range(3)}
    for epoch in range(6):
        sampler.set_epoch(epoch)
        for number, rows in enumerate(turns(sampler, 6)):
            assert set(rows) <= set(parts[number % 3].tolist())
            seen[number % 3] += rows
    for client, rows in seen.items():
        own = sorted(parts[client].tolist())
        passes = [rows[start : start + len(own)] for start in range(0, len(rows) - len(own) + 1, len(own))]
        assert len(passes) == 4
        assert all(sorted(one) == own for one in passes)
        assert len({tuple(one) for one in passes}) == 4  # each in another order


def test_processes_share_the_batches_of_one_client():
    parts = client_parts(50, 2, seed=1)
    options = {"batch_size": 2, "turn": 3, "seed": 5, "num_replicas": 2}
    ranks = [turns(ClientSampler(ROWS, parts, rank=rank, **options), 6) for rank in range(2)]
    whole = turns(ClientSampler(ROWS, parts, 4, 3, 5, num_replicas=1, rank=0), 12)
    for first, second, both in zip(*ranks, whole, strict=True):
        batches = [first[i : i + 2] + second[i : i + 2] for i in (0, 2, 4)]
        assert [row for batch in batches for row in batch] == both


def test_fewer_rows_than_a_turn_come_again():
    sampler = ClientSampler([0, 1, 2], [torch.tensor([0, 2]), torch.tensor([1])], 2, 2, 0, num_replicas=1, rank=0)
    assert [sorted(set(rows)) for rows in turns(sampler, 4)] == [[0, 2], [1]]
