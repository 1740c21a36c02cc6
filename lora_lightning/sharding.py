"""Models whose parameters lie in pieces on several processes (FSDP2): cutting them up, and reading them whole again.

A unit is gathered for its forward and given back. Each block of a model is one, and so are the adapters of a block
(float32 whatever the block is, and gathered until backward); what lies outside blocks belongs to the root's unit.

    block           frozen weights, in the model's dtype      gathered for forward, and again for backward
    its adapters    trained factors, float32                  gathered from forward to backward
    root            embeddings, output layer, trained heads

Pieces are rows: process k of n holds rows [k c, (k + 1) c) of a tensor's first axis, c = ceil(rows / n).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lora_lightning.adapters import experts
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layer import AdaptedLayer
from lora_lightning.errors import AdapterStateError
from lora_lightning.reading import read_layers
from lora_lightning.scopes import pretrained_models

# -- reading -----------------------------------------------------------------------------------------------------------


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter lies in pieces on several processes, so that all of them have to take part in reading it."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor, sharing its memory; a whole tensor is its own piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; for a sharded one every process has to take part."""
    return gather([tensor])[0]


def gather(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor whole, detached: one collective a dtype for those that lie in rows; all processes take part.

    Whole tensors are returned as they are.
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
    """Whole tensors of those sharded by rows, in one all-gather of pieces padded to equal length."""
    n = mesh.size()
    rows = [math.ceil(t.shape[0] / n) for t in tensors]
    sizes = [count * t.shape[1:].numel() for count, t in zip(rows, tensors, strict=True)]
    pieces = [t.to_local() for t in tensors]
    packed = pieces[0].new_zeros(sum(sizes))
    for piece, room in zip(pieces, packed.split(sizes), strict=True):
        room[: piece.numel()].copy_(piece.reshape(-1))
    everyone = [torch.empty_like(packed) for _ in range(n)]
    dist.all_gather(everyone, packed, group=mesh.get_group())
    parts = torch.stack(everyone).split(sizes, dim=1)
    return [
        part.reshape(n * count, *t.shape[1:])[: t.shape[0]].contiguous()
        for part, count, t in zip(parts, rows, tensors, strict=True)
    ]


def gather_nested(value: Any) -> Any:
    """Nested dictionaries and lists with every sharded tensor in them whole; all processes take part."""
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
    """`values` summed over the processes that hold pieces of a tensor in `over`; as they are where all are whole."""
    mesh = next((t.device_mesh for t in over if isinstance(t, DTensor)), None)
    if mesh is None:
        return values
    values = values.to(next(local(t).device for t in over if isinstance(t, DTensor)), copy=True)
    dist.all_reduce(values, group=mesh.get_group())
    return values


# -- writing -----------------------------------------------------------------------------------------------------------


def own_rows(value: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole tensor that this process holds of `like`, which has as many; all of them if it is whole."""
    if not isinstance(like, DTensor):
        return value
    start, count = _rows(like)
    return value[start : start + count]


def first_entry(tensor: Tensor) -> int:
    """Number of the first entry, counted along all of the tensor, that this process holds; 0 of a whole one."""
    return _rows(tensor)[0] * tensor.shape[1:].numel() if isinstance(tensor, DTensor) else 0


def _rows(tensor: DTensor) -> tuple[int, int]:
    """First row that this process holds, and how many."""
    if tensor.placements != (Shard(0),):
        raise AdapterStateError(
            f"a tensor is laid out as {tensor.placements}; only pieces by rows (Shard(0)) are known."
        )
    step = math.ceil(tensor.shape[0] / tensor.device_mesh.size())
    start = min(tensor.device_mesh.get_local_rank() * step, tensor.shape[0])
    return start, min(step, tensor.shape[0] - start)


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal on all processes, in the layout and on the device of `like`; nothing is sent."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value.to(like.device)
    return piece_like(own_rows(value, like).to(like.device, copy=True).contiguous(), like)


def piece_like(piece: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a tensor as one in the layout of `like`."""
    if not isinstance(like, DTensor):
        return piece
    return DTensor.from_local(piece, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def reshard(model: nn.Module) -> None:
    """Give back what a forward without backward has left gathered: only pieces can be read and written."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# -- cutting up --------------------------------------------------------------------------------------------------------


def shard(model: nn.Module, mesh: DeviceMesh, device: torch.device, reshard_after_forward: bool = True) -> list[str]:
    """Cut a model with its adapters into units over the processes of `mesh`, the first of which says the values.

    Values are sent unit by unit, so that no other process ever holds more than one unit whole. Elsewhere parameters may
    be on the meta device.

    Args:
        model: entered through its own forward; adapters are on it already.
        mesh: one axis.
        device: where the pieces lie.
        reshard_after_forward: whether blocks are given back between forward and backward.

    Returns:
        Paths of the blocks.

    Raises:
        AdapterStateError: it is sharded already, or processes hold different models.
    """
    if is_sharded(model) or isinstance(model, FSDPModule):
        raise AdapterStateError("the model is sharded already; leave sharding to the strategy.")
    _check_equal(model, mesh)
    found = blocks(model)
    apart = _entered_adapters(model)
    sender = _Sender(model, mesh, device)
    for block in found.values():
        sender.send(block)
        _cut(block, apart, mesh, reshard_after_forward)
    sender.send(model)
    _cut(model, apart, mesh, None)
    return list(found)


def _cut(module: nn.Module, apart: set[int], mesh: DeviceMesh, reshard_after_forward: bool | None) -> None:
    adapters = [m for m in module.modules() if id(m) in apart and not isinstance(m, FSDPModule)]
    if adapters:
        fully_shard(adapters, mesh=mesh, reshard_after_forward=False)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)


def _entered_adapters(model: nn.Module) -> set[int]:
    """Adapters with parameters that are called; those of layers that are read stay in their block's unit."""
    named = [(path, module) for path, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    read = set(read_layers(model, [path for path, _ in named]))
    return {
        id(adapter)
        for path, layer in named
        if path not in read and not experts.stands_for_parameter(layer)
        for adapter in layer.adapters.values()
        if isinstance(adapter, Adapter) and next(adapter.parameters(), None) is not None
    }


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model by path: what its class says must not be split, and other lists of modules.

    A list counts where it repeats one class, and is not inside a block or around one.
    """
    whole_classes = {
        name for _, part in pretrained_models(model) for name in (getattr(part, "_no_split_modules", None) or ())
    }
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if type(module).__name__ in whole_classes and not _inside(path, found):
            found[path] = module
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(m) for m in module}) == 1:
            inside = any(key.startswith(f"{path}.") for key in found)
            if not inside and not _inside(path, found):
                found |= {f"{path}.{i}": block for i, block in enumerate(module)}
    # a module in several places is one block; one without a forward of its own cannot be a unit
    first = {id(block): path for path, block in reversed(found.items())}
    return {
        path: block
        for path, block in found.items()
        if first[id(block)] == path and not isinstance(block, nn.ModuleList | nn.ModuleDict)
    }


def _inside(path: str, found: Iterable[str]) -> bool:
    return any(path.startswith(f"{outer}.") for outer in found)


class _Sender:
    """Brings tensors of a model to a device, with the first process's values; tied ones stay tied."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
        self.group, self.source, self.device = mesh.get_group(), int(mesh.mesh.flatten()[0]), device
        uses = Counter(id(p) for part in model.modules() for p in part._parameters.values() if p is not None)
        self.shared = {key for key, count in uses.items() if count > 1}
        self.sent: dict[int, tuple[Tensor, Tensor]] = {}
        """Shared parameters by id: the old one, which thereby lives on and keeps its id, and the new one."""
        self.done: set[int] = set()

    def send(self, module: nn.Module) -> None:
        """Send what lies below `module` and has not been sent."""
        for part in module.modules():
            if id(part) not in self.done:
                self.done.add(id(part))
                for table in (part._parameters, part._buffers):
                    for name, tensor in table.items():
                        if tensor is not None:
                            cast("dict[str, Any]", table)[name] = self._one(tensor)

    def _one(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self.sent:
            return self.sent[id(tensor)][1]
        value = torch.empty_like(tensor, device=self.device) if tensor.is_meta else tensor.detach().to(self.device)
        value = value.contiguous()
        dist.broadcast(value, self.source, group=self.group)
        same = not tensor.is_meta and value.data_ptr() == tensor.data_ptr()
        new = tensor if same else value
        if isinstance(tensor, nn.Parameter) and not same:
            new = nn.Parameter(value, requires_grad=tensor.requires_grad)
        if id(tensor) in self.shared:
            self.sent[id(tensor)] = (tensor, new)
        return new


def _check_equal(model: nn.Module, mesh: DeviceMesh) -> None:
    """Names, shapes and dtypes must be the first process's, or collectives would mix tensors up."""
    state: Mapping[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    mine = [(key, tuple(t.shape), str(t.dtype), t.requires_grad) for key, t in state.items()]
    everyone: list[Any] = [None] * mesh.size()
    dist.all_gather_object(everyone, mine, group=mesh.get_group())
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            odd = set(theirs) ^ set(everyone[0])
            what = min(odd)[0] if odd else "their order"
            raise AdapterStateError(
                f"process {rank} holds another model than process 0: {what} differs. Build the model alike on each."
            )


def roots(module: nn.Module) -> dict[str, nn.Module]:
    """Modules below `module` that are entered by their own forward: its children with parameters, through containers.

    Raises:
        AdapterStateError: parameters of `module` itself, which nothing would gather.
    """
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise AdapterStateError(
            f"{type(module).__name__} has parameters of its own ({', '.join(own)}), which no unit would gather; put "
            "them into a submodule with a forward, or train with DDP."
        )
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found |= {f"{name}.{path}": inner for path, inner in roots(child).items()}
        else:
            found[name] = child
    return found
