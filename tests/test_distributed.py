"""Shards of tensors: a full one is its own shard, and shards laid side by side are the full one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lora_lightning.distributed import (
    all_finite,
    as_shard_of,
    assembled,
    fail_together,
    first_entry,
    full_tensor,
    gather,
    gather_nested,
    gather_objects,
    is_sharded,
    leave_process_group,
    local,
    own_rows,
    put,
    shard_like,
    summed,
    zeros_sharded_like,
)
from lora_lightning.errors import AdapterStateError

VALUES = torch.arange(21.0).reshape(7, 3)


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[object]:
    """A mesh of three processes, as process number `request.param` sees it; nothing can be sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=3)
    try:
        yield init_device_mesh("cpu", (3,))
    finally:
        dist.destroy_process_group()


def sharded(mesh: object, axis: int = 0) -> DTensor:
    """Of shape (7, 3), which three processes hold as rows 0 to 2, 3 to 5, and 6."""
    like = VALUES if axis == 0 else VALUES.mT
    rank = dist.get_rank()
    rows = like.chunk(3)[rank] if rank < len(like.chunk(3)) else like[:0]
    found = DTensor.from_local(rows.clone(), mesh, [Shard(0)], shape=like.shape, stride=like.contiguous().stride())
    return found if axis == 0 else found.mT


@pytest.mark.parametrize(("mesh", "rows"), [(0, (0, 3)), (1, (3, 6)), (2, (6, 7))], indirect=["mesh"])
def test_each_process_holds_its_rows(mesh: object, rows: tuple[int, int]) -> None:
    tensor = sharded(mesh)
    assert torch.equal(own_rows(VALUES, tensor), VALUES[slice(*rows)])
    assert torch.equal(own_rows(VALUES, tensor), local(tensor))
    assert first_entry(tensor) == rows[0] * 3
    assert torch.equal(local(shard_like(VALUES + 1, tensor)), VALUES[slice(*rows)] + 1)
    put(tensor, -VALUES)
    assert torch.equal(local(tensor), -VALUES[slice(*rows)])
    zeros = zeros_sharded_like(tensor, torch.float64)
    assert zeros.shape == tensor.shape
    assert local(zeros).dtype == torch.float64
    assert torch.equal(local(zeros), torch.zeros_like(VALUES[slice(*rows)], dtype=torch.float64))
    back = as_shard_of(local(tensor), tensor)
    assert (back.placements, back.shape) == (tensor.placements, tensor.shape)


@pytest.mark.parametrize("mesh", [1], indirect=True)
def test_a_transposed_view_is_cut_along_its_columns(mesh: object) -> None:
    tensor = sharded(mesh, axis=1)
    assert tensor.shape == VALUES.shape
    assert torch.equal(own_rows(VALUES, tensor), VALUES[:, 1:2])
    with pytest.raises(AdapterStateError, match="entries of a transposed shard do not follow each other"):
        first_entry(tensor)


@pytest.mark.parametrize("mesh", [0], indirect=True)
def test_another_layout_than_shards_along_one_axis_is_refused(mesh: object) -> None:
    tensor = DTensor.from_local(VALUES, mesh, [Replicate()])
    with pytest.raises(AdapterStateError, match=r"laid out as \(Replicate\(\),\); only shards along one axis"):
        own_rows(VALUES, tensor)


@pytest.mark.parametrize("mesh", [2], indirect=True)
def test_a_model_is_sharded_where_one_parameter_is(mesh: object) -> None:
    model = nn.Linear(3, 7)
    assert not is_sharded(model)
    model.weight = nn.Parameter(sharded(mesh))
    assert is_sharded(model)


def test_what_is_not_sharded_is_its_own_shard() -> None:
    assert local(VALUES) is VALUES
    assert own_rows(VALUES, VALUES) is VALUES
    assert first_entry(VALUES) == 0
    assert gather([VALUES])[0].data_ptr() == VALUES.data_ptr()
    assert not full_tensor(VALUES.clone().requires_grad_()).requires_grad
    assert summed(VALUES, [VALUES]) is VALUES
    assert gather_nested({"a": [VALUES, 1]})["a"][0] is VALUES
    module = nn.Linear(2, 2)
    before = module.weight
    with assembled(module):
        assert module.weight is before


def test_a_number_that_is_not_finite_is_seen() -> None:
    assert all_finite(VALUES)
    for bad in (float("nan"), float("inf")):
        assert not all_finite(torch.tensor([1.0, bad]))


def test_one_process_agrees_with_itself() -> None:
    assert gather_objects({"a": 1}) == [{"a": 1}]
    with fail_together():
        pass
    with pytest.raises(KeyError, match="own"), fail_together():
        raise KeyError("own")


class Kept:
    """What holds the group in a circle of references, as DDP's reducer may."""

    def __init__(self, group: object, seen: list[bool]) -> None:
        self.own = self
        self.group = group
        self.seen = seen

    def __del__(self) -> None:
        self.seen.append(dist.is_initialized())


def test_a_process_group_is_left_after_what_holds_it() -> None:
    leave_process_group()  # nothing to leave
    seen: list[bool] = []
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    Kept(dist.group.WORLD, seen)
    leave_process_group()
    assert seen == [True]
    assert not dist.is_initialized()
