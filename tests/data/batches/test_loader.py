from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.data import DistributedSampler

from lora_lightning.data.batches.loader import ResumableLoader, count_targets

ROWS = list(range(1, 23))  # 11 batches of 2: with windows of 3 the last has 2 batches


def collate(rows: list[int]) -> dict[str, torch.Tensor]:
    return {"rows": torch.tensor(rows)}


def total(batch: dict[str, torch.Tensor]) -> int:
    return int(batch["rows"].sum())


def loader(workers: int = 0, window: int = 3, count=total, limit: float = 1.0, collate_fn=collate) -> ResumableLoader:
    sampler = DistributedSampler(ROWS, num_replicas=1, rank=0, shuffle=True, seed=7)
    return ResumableLoader(
        ROWS,
        window=window,
        count=count,
        limit=limit,
        batch_size=2,
        sampler=sampler,
        collate_fn=collate_fn,
        num_workers=workers,
    )


def plain(batches) -> list[dict[str, list[int]]]:
    return [{name: values.tolist() for name, values in batch.items()} for batch in batches]


def epoch(made: ResumableLoader, number: int = 0) -> list[dict[str, list[int]]]:
    made.sampler.set_epoch(number)
    return plain(made)


def test_every_batch_carries_the_total_of_its_window():
    batches = epoch(loader())
    sums = [sum(batch["rows"]) for batch in batches]
    assert [batch["window_tokens"] for batch in batches] == [
        sum(sums[first : first + 3]) for first in (0, 3, 6, 9) for _ in sums[first : first + 3]
    ]
    assert next(iter(loader()))["window_tokens"].dtype == torch.int64


def test_without_count_nothing_is_attached_or_read_ahead():
    read = []
    made = loader(count=None, collate_fn=lambda rows: read.append(rows) or collate(rows))
    batch = next(iter(made))
    assert "window_tokens" not in batch
    assert len(read) == 1


def test_seen_counts_batches_handed_out_not_those_looked_ahead():
    made = loader()
    batches = iter(made)
    assert made.state_dict() == {"seen": 0, "epoch": 0}
    for expected in (1, 2, 3, 4):
        next(batches)
        assert made.state_dict()["seen"] == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("window", [1, 3])
def test_resume_goes_on_as_if_never_stopped(workers, window):
    whole = epoch(loader(workers, window), 2)
    for stop in range(1, 11) if workers == 0 else (4,):
        stopped = loader(workers, window)
        stopped.sampler.set_epoch(2)
        batches = iter(stopped)
        before = plain(next(batches) for _ in range(stop))
        resumed = loader(workers, window)
        resumed.load_state_dict(stopped.state_dict())
        assert before + epoch(resumed, 2) == whole
        assert resumed.state_dict() == {"seen": 11, "epoch": 2}


def test_only_the_first_epoch_after_loading_is_shortened():
    made = loader()
    made.load_state_dict({"seen": 9, "epoch": 0})
    assert len(epoch(made, 0)) == 2
    assert epoch(made, 1) == epoch(loader(), 1)


def test_a_position_of_another_epoch_skips_nothing():
    made = loader()
    made.load_state_dict({"seen": 11, "epoch": 0})  # saved at the end of epoch 0, the next to be read is 1
    assert epoch(made, 1) == epoch(loader(), 1)


def test_skipped_batches_are_not_collated():
    read = []
    made = loader(collate_fn=lambda rows: read.append(rows) or collate(rows))
    made.load_state_dict({"seen": 7, "epoch": 0})
    list(made)
    assert len(read) == 5  # the window of batch 7 starts at 6


def test_order_changes_with_the_epoch_and_repeats_with_the_seed():
    assert epoch(loader(), 0) == epoch(loader(), 0)
    orders = [[batch["rows"] for batch in epoch(loader(), number)] for number in range(3)]
    assert all(one != other for one, other in pairwise(orders))


@pytest.mark.parametrize(("limit", "used"), [(5, 5), (0.5, 5), (100, 11), (1, 1), (1.0, 11)])
def test_last_window_ends_where_the_trainer_stops(limit, used):
    batches = epoch(loader(limit=limit))
    assert len(batches) == used
    last = batches[3:5] if used == 5 else batches[9:]
    if last:
        assert last[-1]["window_tokens"] == sum(sum(batch["rows"]) for batch in last)


def test_targets_are_counted_after_the_shift():
    labels = torch.tensor([[5, -100, 6, 7], [-100, -100, -100, 8]])
    assert count_targets({"labels": labels}) == 3
