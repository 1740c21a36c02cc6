"""Rows to one batch of tensors."""

from __future__ import annotations

import torch

from lora_lightning.data.batches.collate import Collate

ROWS = [
    {"input_ids": [7, 8, 9], "attention_mask": [1, 1, 1], "labels": [-100, 8, 9], "index": 4, "truncated": False},
    {"input_ids": [5], "attention_mask": [1], "labels": [5], "index": 2, "truncated": True},
]


def test_lists_are_padded_each_with_its_own_number():
    batch = Collate(pad_token_id=3)(ROWS)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 8, 9], [5, -100, -100]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert {values.dtype for values in batch.values()} == {torch.int64}


def test_other_columns_come_when_they_are_named():
    batch = Collate(0, ("input_ids", "index", "position_ids"))(ROWS)
    assert set(batch) == {"input_ids", "index"}
    assert batch["index"].tolist() == [4, 2]


def test_numbers_on_a_scale_are_float32_and_classes_int64():
    assert Collate(0)([{"labels": 0.5}, {"labels": 2.0}])["labels"].dtype == torch.float32
    assert Collate(0)([{"labels": 1}, {"labels": 0}])["labels"].dtype == torch.int64
    many_hot = Collate(0)([{"labels": [1.0, 0.0]}, {"labels": [0.0, 0.0]}])["labels"]
    assert (many_hot.dtype, many_hot.tolist()) == (torch.float32, [[1.0, 0.0], [0.0, 0.0]])
