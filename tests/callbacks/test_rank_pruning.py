"""Rank pruning: the rank it reaches, what stays out, what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from projects import Plain, fit

from ll_lora import LoRA
from lora_lightning.callbacks import InjectAdapters, RankPruning
from lora_lightning.errors import SettingsError
from lora_lightning.injection.records import trainable_adapters


def test_rank_pruning_reaches_its_rank_and_removed_components_stay_out(tmp_path):
    masks = []

    class Look(Callback):
        phase = 8

        def on_train_batch_end(self, trainer, pl_module, *args):
            adapter = next(iter(trainable_adapters(pl_module).values()))
            masks.append(adapter.rank_mask.clone())

    module = Plain()
    fit(module, tmp_path, [InjectAdapters(LoRA(rank=4), ["used"]), RankPruning(2, start=2, end=6), Look()], max_steps=8)
    assert [int(mask.sum()) for mask in masks][:2] == [4, 4]
    assert [int(mask.sum()) for mask in masks][5:] == [2, 2, 2]
    assert all(not (later & ~earlier).any() for earlier, later in itertools.pairwise(masks))
    adapter = next(iter(trainable_adapters(module).values()))
    A, B = adapter.low_rank()
    assert A.shape == (2, 4)
    torch.testing.assert_close(B @ A, adapter.merged_weight(torch.zeros(4, 4)).detach())


def test_rank_pruning_refuses_a_rank_above_the_adapters(tmp_path):
    with pytest.raises(SettingsError, match=r"RankPruning.final_rank is 5; used.* has rank 2"):
        fit(Plain(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"]), RankPruning(5, start=2, end=4)])
