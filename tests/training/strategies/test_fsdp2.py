"""FSDP2 on one process: what it refuses, and what its files hold; runs on two are in `test_sharded_runs.py`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from torch import nn

from ll_lora import LoRA
from lora_lightning import inject
from lora_lightning.callbacks import Cascade
from lora_lightning.errors import SettingsError
from lora_lightning.training.strategies import FSDP2


def holding(model, strict):
    strategy = FSDP2()
    model.strict_loading = strict
    strategy._lightning_module = strategy.model = model
    return strategy


def test_weights_that_wait_on_the_cpu():
    FSDP2().refuse([Cascade(stage_steps=2)])
    offloading = FSDP2(cpu_offload=True)
    with pytest.raises(SettingsError, match=r"Cascade .* then wait on the CPU, away from the adapters"):
        offloading.refuse([Cascade(stage_steps=2)])
    offloading.accelerator = CPUAccelerator()
    with pytest.raises(SettingsError, match="steps are taken on the CPU, where all weights lie already"):
        offloading.refuse([])


@pytest.mark.parametrize("strict", [True, False])
def test_files_hold_the_adapter_alone_or_everything(strict):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    inject(model, LoRA(rank=1), ["0"], also_train=())
    state = holding(model, strict).lightning_module_state_dict()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    if strict:
        assert state.keys() == model.state_dict().keys()
    else:
        assert state.keys() == {f"0.adapters.default.{name}" for name in ("lora_A", "lora_B", "rank_mask")}


def test_a_module_without_adapters_is_written_whole():
    model = nn.Sequential(nn.Linear(4, 4))
    assert holding(model, False).lightning_module_state_dict().keys() == model.state_dict().keys()


def test_a_state_is_loaded_into_plain_parameters():
    model, other = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    holding(model, True).load_model_state_dict({"state_dict": other.state_dict()})
    assert torch.equal(model[0].weight, other[0].weight)


def test_what_a_step_gathers_is_given_back(monkeypatch):
    given = []
    monkeypatch.setattr("lora_lightning.training.strategies.fsdp2.reshard", given.append)
    strategy = FSDP2()
    strategy.model = SimpleNamespace()
    assert strategy._step(lambda x: x + 1, 2) == 3
    assert given == [strategy.model]
