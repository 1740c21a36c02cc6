"""Several processes that must agree, and tensors of which each holds a shard: reading them in full, and writing.

Shards are rows: process k of n holds rows [k c, (k + 1) c) of a tensor's first axis, c = ceil(rows / n). A transposed
view of such a tensor is cut along another axis, in the same way.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lora_lightning.errors import AdapterStateError, ProcessError

T = TypeVar("T")

# -- reading -----------------------------------------------------------------------------------------------------------


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter is sharded on several processes, so that all of them have to take part in reading it."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, sharing its memory; a tensor that is not sharded is its own shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, detached; for a sharded one every process has to take part."""
    return gather([tensor])[0]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, differentiable, so that each process's loss may hold the same function of it; all take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor in full, detached. All processes take part, in one collective a dtype for those sharded by rows.

    Tensors that are not sharded are returned as they are.
    """
    found = [tensor.detach() for tensor in tensors]
    groups: dict[Any, list[int]] = {}
    for i, tensor in enumerate(found):
        if isinstance(tensor, DTensor):
            by_rows = tensor.placements == (Shard(0),) and tensor.dim() > 0
            if by_rows:
                groups.setdefault((tensor.device_mesh, tensor.dtype), []).append(i)
            else:
                found[i] = tensor.full_tensor()
    for (mesh, _), where in groups.items():
        for i, value in zip(where, _gather_rows([cast(DTensor, found[i]) for i in where], mesh), strict=True):
            found[i] = value
    return found


def _gather_rows(tensors: Sequence[DTensor], mesh: DeviceMesh) -> list[Tensor]:
    """The full tensors of some sharded by rows, in one all-gather of shards padded to equal length."""
    n = mesh.size()
    rows = [math.ceil(t.shape[0] / n) for t in tensors]
    sizes = [count * t.shape[1:].numel() for count, t in zip(rows, tensors, strict=True)]
    shards = [t.to_local() for t in tensors]
    buffer = shards[0].new_zeros(sum(sizes))
    for shard, room in zip(shards, buffer.split(sizes), strict=True):
        room[: shard.numel()].copy_(shard.reshape(-1))
    buffer = buffer.to(mesh.device_type)  # where collectives run; shards may wait on the CPU
    everyone = [torch.empty_like(buffer) for _ in range(n)]
    dist.all_gather(everyone, buffer, group=mesh.get_group())
    parts = torch.stack(everyone).split(sizes, dim=1)
    return [
        part.reshape(n * count, *t.shape[1:])[: t.shape[0]].contiguous()
        for part, count, t in zip(parts, rows, tensors, strict=True)
    ]


def gather_nested(value: Any) -> Any:
    """Nested dictionaries and lists, every sharded tensor in them gathered; all processes take part."""
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    _map_sharded(value, collect)
    found = iter(gather(tensors))
    return _map_sharded(value, lambda _: next(found))


def _map_sharded(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, DTensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_sharded(inside, change) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_sharded(inside, change) for inside in value)
    return value


def summed(values: Tensor, over: Sequence[Tensor]) -> Tensor:
    """`values` summed over the processes that hold shards of a tensor in `over`; as they are where none is sharded."""
    mesh = next((t.device_mesh for t in over if isinstance(t, DTensor)), None)
    if mesh is None:
        return values
    values = values.to(mesh.device_type, copy=True)  # where collectives run; shards may wait on the CPU
    dist.all_reduce(values, group=mesh.get_group())
    return values


def all_finite(tensor: Tensor) -> bool:
    """Whether every entry is a finite number, on all processes that hold a shard."""
    bad = (~torch.isfinite(local(tensor.detach()))).sum()
    return not bool(summed(bad, [tensor]))


@contextmanager
def assembled(*modules: nn.Module) -> Iterator[None]:
    """Inside, sharded parameters of `modules` are full copies, gathered in one collective.

    So are those of modules that an adapter among them refers to as `linked` or `peers`. All processes take part, and
    hold all of these parameters until the end.
    """
    found: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = [
        (part._parameters, name, cast(nn.Parameter, parameter))
        for part in _with_linked(modules)
        for name, parameter in part._parameters.items()
        if isinstance(parameter, DTensor)
    ]
    for (table, name, parameter), value in zip(found, gather([p for _, _, p in found]), strict=True):
        table[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for table, name, parameter in found:
            table[name] = parameter


def _with_linked(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """All parts of the modules and of what they refer to as `linked` or `peers`, each once."""
    found: dict[int, nn.Module] = {}
    for part in (part for module in modules for part in module.modules()):
        linked, peers = getattr(part, "linked", {}), getattr(part, "peers", ())
        read = (*(linked.values() if isinstance(linked, Mapping) else ()), *(peers if isinstance(peers, tuple) else ()))
        for module in (part, *read):
            found |= {id(inner): inner for inner in module.modules()}
    return list(found.values())


# -- writing -----------------------------------------------------------------------------------------------------------


def own_rows(value: Tensor, like: Tensor) -> Tensor:
    """The rows of a full tensor that this process holds of `like`, which has as many; all if `like` is not sharded.

    Of a transposed `like`, columns.
    """
    if not isinstance(like, DTensor):
        return value
    return value.narrow(*_slice(like))


def first_entry(tensor: Tensor) -> int:
    """Number of the first entry that this process holds, counted along the full tensor; 0 where it is not sharded."""
    if not isinstance(tensor, DTensor):
        return 0
    axis, start, _ = _slice(tensor)
    if axis:
        raise AdapterStateError("entries of a transposed shard do not follow each other.")
    return start * tensor.shape[1:].numel()


def _slice(tensor: DTensor) -> tuple[int, int, int]:
    """The axis that is cut, where this process's shard starts on it, and how long it is."""
    (placement,) = tensor.placements if len(tensor.placements) == 1 else (None,)
    if not isinstance(placement, Shard):
        raise AdapterStateError(f"a tensor is laid out as {tensor.placements}; only shards along one axis are known.")
    axis = placement.dim
    step = math.ceil(tensor.shape[axis] / tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_local_rank() * step, tensor.shape[axis])
    return axis, start, min(step, tensor.shape[axis] - start)


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A full tensor, equal on all processes, in the layout and on the device of `like`; nothing is sent."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value.to(like.device)
    return as_shard_of(own_rows(value, like).to(like.device, copy=True).contiguous(), like)


def as_shard_of(shard: Tensor, like: Tensor) -> Tensor:
    """The tensor in the layout of `like` of which `shard`, contiguous, is this process's shard."""
    if not isinstance(like, DTensor):
        return shard
    stride = torch.empty(like.shape, device="meta").stride()  # `like` may be a transposed view
    return DTensor.from_local(shard, like.device_mesh, like.placements, shape=like.shape, stride=stride)


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor, equal on all processes, into one that may be sharded; nothing is sent."""
    local(target).copy_(own_rows(value, target))


def zeros_sharded_like(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the shape, and in the layout and place, of `like`."""
    return as_shard_of(torch.zeros(local(like.detach()).shape, dtype=dtype, device=like.device), like)


# -- agreeing ----------------------------------------------------------------------------------------------------------


def gather_objects(mine: Any) -> list[Any]:
    """One object of every process, in the order of ranks."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def summed_over_all(values: Tensor) -> Tensor:
    """`values` summed over all processes, each of which has to take part."""
    if not dist.is_initialized():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


@contextmanager
def fail_together() -> Iterator[None]:
    """An error on one process becomes one on all, so that none is left waiting; nothing inside may wait for others.

    Raises:
        ProcessError: it was another process that failed.
    """
    try:
        yield
    except Exception as error:
        if dist.is_initialized():
            gather_objects(f"{type(error).__name__}: {error}")
        raise
    for rank, failure in enumerate(gather_objects(None)):
        if failure is not None:
            raise ProcessError(f"process {rank} failed: {failure}")


def from_first(make: Callable[[], T]) -> T:
    """What `make` answers on the first process, on all of them; an error there is one everywhere.

    Only the first process calls it, so nothing inside may wait for others. Tensors in the answer lie on the CPU.
    """
    if not dist.is_initialized():
        return make()
    answer: list[Any] = [None]
    with fail_together():
        if dist.get_rank() == 0:
            answer = [make()]
    dist.broadcast_object_list(answer)
    return cast(T, answer[0])


def leave_process_group() -> None:
    """End this process's part in its process group, if it has one; for the end of a program.

    The group's threads may want the interpreter's lock when they end. DDP's reducer holds that lock while it waits for
    them, so it goes first; and after the end of the interpreter such a thread aborts the process.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def reshard(model: nn.Module) -> None:
    """Give back what a forward without backward has left gathered: only shards can be read and written."""
    reshard_all(model.modules())


def reshard_all(modules: Iterable[nn.Module]) -> None:
    """As `reshard`, for modules that are known already."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()
