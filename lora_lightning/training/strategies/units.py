"""Units of FSDP2: which parts of a model are sharded together, and how they are cut and sent.

A unit is gathered for its forward and given back. Each block of a model is one, and so are the adapters of a block
(float32 whatever the block is, and gathered until backward); what lies outside blocks belongs to the root's unit.

    block           frozen weights, in the model's dtype      gathered for forward, and again for backward
    its adapters    trained factors, float32                  gathered from forward to backward
    root            embeddings, output layer, trained heads

What a shard is, and how tensors are read and written, stands in `lora_lightning.distributed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.linked import LinkedAdapters
from lora_lightning.distributed import is_sharded
from lora_lightning.errors import AdapterStateError
from lora_lightning.models import experts
from lora_lightning.models.scopes import pretrained_models
from lora_lightning.models.weight_readers import weight_read_layers


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    device: torch.device,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> list[str]:
    """Cut a model with its adapters into units over the processes of `mesh`, the first of which says the values.

    Values are sent unit by unit, so that no other process ever holds more than one full unit. Elsewhere parameters may
    be on the meta device.

    Args:
        model: entered through its own forward; adapters are on it already.
        mesh: one axis.
        device: where the shards lie.
        reshard_after_forward: whether blocks are given back between forward and backward.
        cpu_offload: whether the shards of blocks wait in the CPU's memory.

    Returns:
        Paths of the blocks.

    Raises:
        AdapterStateError: it is sharded already, processes hold different models, or a block to wait on the CPU holds
            tensors that train and cannot be kept apart.
    """
    if is_sharded(model) or isinstance(model, FSDPModule):
        raise AdapterStateError("the model is sharded already; leave sharding to the strategy.")
    _check_equal(model, mesh)
    found = find_blocks(model)
    apart = _entered_adapters(model)
    _check_peers(model, apart)
    sender = _Sender(model, mesh, device)
    for block in found.values():
        sender.send(block)
        _cut(block, apart, mesh, reshard_after_forward, cpu_offload)
    sender.send(model)
    _cut(model, apart, mesh, None)
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            module.follow_sharding()
    return list(found)


def _cut(
    module: nn.Module, apart: set[int], mesh: DeviceMesh, reshard_after_forward: bool | None, cpu_offload: bool = False
) -> None:
    adapters = [m for m in module.modules() if id(m) in apart and not isinstance(m, FSDPModule)]
    if adapters:
        fully_shard(adapters, mesh=mesh, reshard_after_forward=False)
    trained = [name for name, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if cpu_offload and trained:
        raise AdapterStateError(
            f"cpu_offload is True, but {trained[0]} trains inside a block that would wait on the CPU; leave it false, "
            "or exclude that layer."
        )
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, offload_policy=offload)


def _entered_adapters(model: nn.Module) -> set[int]:
    """Adapters with parameters that are called; those of layers that are read stay in their block's unit."""
    modules = dict(model.named_modules())
    named = [(path, module) for path, module in modules.items() if isinstance(module, AdaptedLayer)]
    read = set(weight_read_layers(modules, [path for path, _ in named]))
    return {
        id(adapter)
        for path, layer in named
        if path not in read and not experts.stands_for_parameter(layer)
        for adapter in layer.adapters.values()
        if isinstance(adapter, Adapter) and next(adapter.parameters(), None) is not None
    }


def _check_peers(model: nn.Module, apart: set[int]) -> None:
    """Raise `AdapterStateError` where an adapter reads another's tensors that lie in a block's own unit."""
    paths = {id(module): path for path, module in model.named_modules() if isinstance(module, Adapter)}
    for adapter in (module for module in model.modules() if isinstance(module, Adapter)):
        for peer in adapter.peers:
            if id(peer) not in apart:
                raise AdapterStateError(
                    f"{paths[id(adapter)]} reads the tensors of {paths[id(peer)]}, whose layer is read by its block "
                    "instead of being called, so that they are given back after that block. Exclude such layers, or "
                    "train with DDP."
                )


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model by path: what its class says must not be split, and other lists of modules.

    A list counts where it repeats one class, and is not inside a block or around one.
    """
    modules = dict(model.named_modules())
    unsplit = {
        name
        for part in pretrained_models(modules).values()
        for name in (getattr(part, "_no_split_modules", None) or ())
    }
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if type(module).__name__ in unsplit and not _inside(path, found):
            found[path] = module
    for path, module in modules.items():
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
        if isinstance(child, LinkedAdapters):
            raise AdapterStateError(
                f"adapted layers share tensors above several modules of {type(module).__name__}, which no unit would "
                "gather; put these modules into one submodule with a forward, or train with DDP."
            )
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found |= {f"{name}.{path}": inner for path, inner in roots(child).items()}
        else:
            found[name] = child
    return found
