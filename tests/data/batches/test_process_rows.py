"""Rows of several processes: each row in one of them, and as many batches everywhere."""

from __future__ import annotations

from itertools import product

import pytest
from torch.utils.data import BatchSampler, DistributedSampler
from toy_runs import labelled_file

from lora_lightning.data import LabelledText, TextPairs
from lora_lightning.data.batches.grouping import LengthGroupedSampler
from lora_lightning.data.batches.process_rows import EachOnce, equal_batches
from lora_lightning.errors import DataError


@pytest.mark.parametrize("grouped", [False, True])
def test_every_row_once_in_as_many_batches(grouped):
    for rows, processes, size in product((4, 7, 8, 9, 33, 64, 65), (1, 2, 3, 4), (1, 2, 3, 4, 16)):
        size = equal_batches(rows, processes, size)
        lengths, shares, batches = [rows * 7 % (k + 2) for k in range(rows)], [], set()
        for rank in range(processes):
            options = {"num_replicas": processes, "rank": rank, "shuffle": False}
            dealt = (
                LengthGroupedSampler(lengths, size, **options) if grouped else DistributedSampler(lengths, **options)
            )
            share = EachOnce(dealt)
            assert len(list(share)) == len(share)
            shares += list(share)
            batches.add(len(list(BatchSampler(share, size, drop_last=False))))
            order = [row for row in dealt if row in share.own]
            assert list(share) == order
        assert sorted(shares) == list(range(rows))
        assert len(batches) == 1


@pytest.mark.parametrize(
    ("rows", "processes", "wanted", "size"),
    [(64, 2, 16, 16), (65, 2, 16, 15), (67, 2, 16, 16), (5, 2, 2, 3), (5, 2, 1, 3)],
)
def test_sizes_of_batches(rows, processes, wanted, size):
    """65 rows make 33 and 32 of two processes: two batches of 16, and one row over on one process only."""
    assert equal_batches(rows, processes, wanted) == size


class Trainer:
    """As many processes as a data module asks about."""

    accumulate_grad_batches, limit_train_batches = 1, 1.0

    def __init__(self, processes, rank):
        self.distributed_sampler_kwargs = {"num_replicas": processes, "rank": rank}


def served(data, split, processes):
    """Rows of a split by process."""
    found = []
    for rank in range(processes):
        data.trainer = Trainer(processes, rank)
        loader = getattr(data, f"{split}_dataloader")()
        found.append([batch["input_ids"].shape[0] for batch in loader])
    return found


@pytest.fixture
def data(tmp_path, encoder_tokenizer):
    rows = str(labelled_file(tmp_path / "rows.csv", rows=9))
    module = LabelledText(train=rows, validation=rows, test=rows, tokenizer=encoder_tokenizer, batch_size=2)
    module.setup("fit")
    module.setup("test")
    return module


def test_a_data_module_measures_each_row_once(data):
    assert served(data, "val", 2) == served(data, "test", 2) == [[3, 2], [3, 1]]
    assert served(data, "train", 2) == [[2, 2, 1], [2, 2, 1]]  # as many for every step
    assert served(data, "val", 1) == [[2, 2, 2, 2, 1]]


def test_rows_that_are_fewer_than_processes(data):
    with pytest.raises(DataError, match=r"LabelledText.validation has 9 rows, fewer than the 16 processes"):
        served(data, "val", 16)


def test_rows_that_are_compared_are_as_many_on_every_process(tmp_path, encoder_tokenizer):
    file = tmp_path / "pairs.csv"
    file.write_text("\n".join(["anchor,positive", *(f"a{i},b{i}" for i in range(9))]) + "\n")
    pairs = TextPairs(train=str(file), validation=str(file), tokenizer=encoder_tokenizer, batch_size=2)
    pairs.setup("fit")
    assert served(pairs, "val", 2) == [[4, 4, 2], [4, 4, 2]]  # anchors and positives
