"""Modules above one layer: made by `Method.link`, put at their owners, taken off again.

An owner is a module around the layers that read what it owns: a block for a gate, the innermost module around all
sharing layers for shared factors (`common_owner`). Under FSDP2 that is what gathers them: a tensor in a block is there
while the block runs, one above all blocks from the model's forward to its backward.

    <owner>.adapters.<name>.<tensor>      beside the adapters of layers, <layer>.adapters.<name>.<tensor>
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from lora_lightning.adapters.base import Adapter, linked_modules
from lora_lightning.adapters.linked import Linked, LinkedAdapters
from lora_lightning.errors import AdapterStateError, PluginError
from lora_lightning.injection.gates import Gate, add_gate_hooks, remove_context_hooks, remove_gate_hooks
from lora_lightning.injection.records import records
from lora_lightning.methods import Method
from lora_lightning.models.blocks import same_place_before
from lora_lightning.seeds import generator

A = TypeVar("A", bound=Adapter)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def common_owner(model: nn.Module, paths: Iterable[str]) -> str:
    """Path of the innermost module around all of `paths` that has a forward of its own; "" is the model.

    Example:
        >>> model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)])})
        >>> common_owner(model, ["blocks.0.0", "blocks.1"])
        ''
    """
    split = [path.split(".")[:-1] for path in paths]
    common = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    while common and isinstance(model.get_submodule(".".join(common)), _CONTAINERS):
        common.pop()
    return ".".join(common)


def earlier_alike(
    model: nn.Module, adapters: Mapping[str, A], what: Callable[[A], object], count: int
) -> dict[str, tuple[A, ...]]:
    """For each adapter, those at the same place in earlier blocks that are alike, nearest first.

    Args:
        model: with the layers.
        adapters: by path, in the order of the model.
        what: must be equal for two to be alike; others are passed over.
        count: how many at most; -1 for all.
    """
    found = {}
    for path, earlier in same_place_before(model, adapters).items():
        own = what(adapters[path])
        alike = tuple(adapters[place] for place in earlier if what(adapters[place]) == own)
        found[path] = alike if count < 0 else alike[:count]
    return found


def link(method: Method, model: nn.Module, adapters: Mapping[str, Adapter], seed: int) -> dict[str, Linked]:
    """The method's linked modules by the path of their owners, with start values; adapters refer to them from here on.

    Raises:
        PluginError: a module that no adapter reads, or one that an adapter reads and `link` does not return.
        AdapterStateError: an owner has an attribute `adapters` of its own, or is adapted itself.
    """
    found = dict(method.link(model, adapters))
    read = {id(module) for module in linked_modules(adapters.values())}
    given = {id(module): path for path, module in found.items()}
    name = type(method).__name__
    for key, path in given.items():
        if key not in read:
            raise PluginError(f'{name}.link returns a module at "{path}" that no adapter reads; set Adapter.linked.')
    if read - given.keys():
        raise PluginError(f"{name}.link sets Adapter.linked to a module that it does not return, so it would be lost.")
    for path in found:
        owner = model.get_submodule(path)
        if not isinstance(getattr(owner, "adapters", LinkedAdapters()), LinkedAdapters):
            raise AdapterStateError(
                f'{path or "the model"} ({type(owner).__name__}) has an attribute "adapters" already, where {name} '
                "would put what its layers share; choose other targets."
            )
    for path, module in found.items():
        module.reset(generator(seed, "init", 0, f"{path}.adapters"))
    return found


def attach(model: nn.Module, name: str, linked: Mapping[str, Linked]) -> None:
    """Register linked modules at their owners, under an adapter's name."""
    for path, module in linked.items():
        owner: Any = model.get_submodule(path)
        if not isinstance(getattr(owner, "adapters", None), LinkedAdapters):
            owner.adapters = LinkedAdapters()
        owner.adapters[name] = module.train(owner.training)
        if isinstance(module, Gate):
            add_gate_hooks(model, owner)


@contextmanager
def without_linked(model: nn.Module) -> Iterator[None]:
    """Inside, owners are plain modules, as a file of the plain model names their tensors; adapters read on."""
    owners = {path: model.get_submodule(path) for record in records(model).values() for path in record.linked}
    holders = {path: owner._modules.pop("adapters") for path, owner in owners.items()}
    try:
        yield
    finally:
        for path, owner in owners.items():
            owner._modules["adapters"] = holders[path]


def detach(model: nn.Module, name: str, owners: Sequence[str]) -> None:
    """Take an adapter's linked modules off their owners; where an owner has no other, nothing of ours is left there."""
    for path in owners:
        owner = model.get_submodule(path)
        holder = owner.adapters
        if not isinstance(holder, LinkedAdapters):
            raise AdapterStateError(f"{path or 'the model'}: what its adapters shared has been replaced.")
        del holder[name]
        if not len(holder):
            del owner.adapters
        remove_gate_hooks(owner)
    remove_context_hooks(model)
