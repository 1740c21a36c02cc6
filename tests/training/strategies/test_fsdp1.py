"""FSDP1 on one process: what it refuses, and what it hands on; runs on two are in `test_sharded_runs.py`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ll_lora import LoRA
from lora_lightning import inject
from lora_lightning.callbacks import Cascade, SparsitySchedule
from lora_lightning.errors import AdapterStateError, SettingsError
from lora_lightning.training.strategies import FSDP1


def test_callbacks():
    FSDP1().refuse([SparsitySchedule()])
    with pytest.raises(SettingsError, match=r"strategy is FSDP1, but Cascade .*flat shards\. Take FSDP2, or ddp"):
        FSDP1().refuse([Cascade(stage_steps=2)])


def test_files_that_would_hold_frozen_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoRA(rank=1), ["0"], also_train=())
    strategy = FSDP1()
    strategy._lightning_module = SimpleNamespace(strict_loading=True)
    with pytest.raises(AdapterStateError, match="checkpoints hold the adapter alone; set strict_loading = False"):
        strategy._setup_model(model)


def test_gradients_are_averaged_and_one_that_is_nowhere_stays_away(monkeypatch):
    """Two processes stood in for: the sum over both is three times the own gradient."""
    strategy = FSDP1()
    with_gradient, without = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))
    with_gradient.grad = torch.full((2, 2), 4.0)
    strategy._apart = [with_gradient, without]
    monkeypatch.setattr(FSDP1, "root_device", torch.device("cpu"))
    monkeypatch.setattr(FSDP1, "world_size", 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(3))
    strategy.post_backward(torch.zeros(()))
    assert torch.equal(with_gradient.grad, torch.full((2, 2), 6.0))
    assert without.grad is None
