"""What FSDP2 and FSDP1 share: states of optimizers as one process has them, and callbacks that read frozen weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lora_lightning.callbacks import Cascade, SparsitySchedule
from lora_lightning.errors import SettingsError
from lora_lightning.training.strategies.sharded import check_base_unread, load_optimizers, optimizer_state


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def optimizer_over(value):
    parameter = nn.Parameter(value)
    return parameter, torch.optim.AdamW([parameter], lr=0.1)


def stepped(value, grad):
    parameter, optimizer = optimizer_over(value)
    parameter.grad = grad
    optimizer.step()
    return parameter, optimizer


def test_a_sharded_state_is_gathered_and_cut_again(mesh):
    value, grad = torch.randn(4, 3), torch.randn(4, 3)
    cut = lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])  # noqa: E731
    _, sharded = stepped(cut(value.clone()), cut(grad))
    _, plain = stepped(value.clone(), grad)
    saved = optimizer_state(LightningOptimizer(sharded))
    expected = plain.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    for name, tensor in expected["state"][0].items():
        assert not isinstance(saved["state"][0][name], DTensor)
        torch.testing.assert_close(saved["state"][0][name], tensor)

    parameter, again = optimizer_over(cut(value.clone()))
    strategy = SimpleNamespace(optimizers=[again], root_device=torch.device("cpu"))
    load_optimizers(strategy, {"optimizer_states": [saved]})
    state = again.state[parameter]
    assert isinstance(state["exp_avg"], DTensor)
    assert not isinstance(state["step"], DTensor)
    torch.testing.assert_close(state["exp_avg"].to_local(), expected["state"][0]["exp_avg"])


def test_callbacks_that_read_frozen_weights_are_refused():
    check_base_unread([SparsitySchedule()], "FSDP1", "FSDP1 keeps.")
    with pytest.raises(SettingsError, match=r"strategy is FSDP1, but Cascade reads or writes .*, which it keeps"):
        check_base_unread([SparsitySchedule(), Cascade(stage_steps=2)], "FSDP1", "it keeps.")
