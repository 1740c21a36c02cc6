"""Grouping by length: every row once, the order from (seed, epoch) alone, and less padding."""

from __future__ import annotations

import torch
from torch.utils.data import DistributedSampler

from lora_lightning.data.batches.grouping import LengthGroupedSampler
from lora_lightning.data.batches.loader import ResumableLoader

LENGTHS = torch.randint(3, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()


def sampler(epoch: int = 0, shuffle: bool = True, rank: int = 0, ranks: int = 1, seed: int = 0) -> LengthGroupedSampler:
    made = LengthGroupedSampler(LENGTHS, 8, num_replicas=ranks, rank=rank, shuffle=shuffle, seed=seed)
    made.set_epoch(epoch)
    return made


def padded(order: list[int]) -> int:
    batches = [order[i : i + 8] for i in range(0, len(order), 8)]
    return sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)


def test_every_row_once_in_an_order_of_seed_and_epoch():
    first = list(sampler())
    assert sorted(first) == list(range(200))
    assert list(sampler()) == first
    assert list(sampler(epoch=1)) != first
    assert list(sampler(seed=1)) != first


def test_less_padding_than_a_plain_shuffle():
    plain = list(DistributedSampler(LENGTHS, num_replicas=1, rank=0, seed=0))
    assert padded(list(sampler())) < 0.75 * padded(plain)


def test_batches_are_not_in_order_of_length():
    order = list(sampler())
    longest = [max(LENGTHS[row] for row in order[i : i + 8]) for i in range(0, 200, 8)]
    assert longest != sorted(longest)


def test_a_short_batch_is_the_last():
    lengths = LENGTHS[:195]
    order = list(LengthGroupedSampler(lengths, 8, num_replicas=1, rank=0))
    assert sorted(order) == list(range(195))
    tail = order[-3:]
    assert max(lengths[row] for row in tail) - min(lengths[row] for row in tail) < 20


def test_unshuffled_is_sorted():
    order = list(sampler(shuffle=False))
    assert [LENGTHS[row] for row in order] == sorted(LENGTHS)


def test_two_processes_share_the_rows():
    rows = [set(sampler(rank=rank, ranks=2)) for rank in range(2)]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == set(range(200))


def test_processes_have_as_many_batches_when_the_rows_do_not_divide():
    lengths = LENGTHS[:197]
    rows = [list(LengthGroupedSampler(lengths, 8, num_replicas=2, rank=rank)) for rank in range(2)]
    assert len(rows[0]) == len(rows[1])
    assert set(rows[0] + rows[1]) == set(range(197))
    assert len(rows[0] + rows[1]) == 198  # one row twice


def test_resume_goes_on_as_if_never_stopped():
    def loader() -> ResumableLoader:
        made = LengthGroupedSampler(LENGTHS, 8, num_replicas=2, rank=1, seed=3)
        made.set_epoch(2)
        return ResumableLoader(list(range(200)), batch_size=8, sampler=made)

    whole = [batch.tolist() for batch in loader()]
    for stop in range(1, len(whole)):
        stopped, resumed = loader(), loader()
        batches = iter(stopped)
        assert [next(batches).tolist() for _ in range(stop)] == whole[:stop]
        resumed.load_state_dict(stopped.state_dict())
        assert [batch.tolist() for batch in resumed] == whole[stop:]
