"""Heads of adapters: fully trained base parameters, of which each adapter has values of its own, as the base model has.

The model has each such parameter once. It holds the values of the adapter that is active, of several the last one that
trains it, and else those of the base model; the others wait here, by name. Buffers of the modules that own such
parameters, such as the statistics of a normalisation, change hands with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.base import trains
from lora_lightning.distributed import from_first, local, put, reshard
from lora_lightning.injection.records import adapters_named, find_root, records
from lora_lightning.models.paths import join

_HEADS = "_lora_lightning_heads"


@dataclass
class _Heads:
    base: dict[str, Tensor] = field(default_factory=dict)
    """The base model's values, by name of the tensor in the model."""
    waiting: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """Values of adapters that are not in the model now, by (adapter, name)."""
    sent: set[str] = field(default_factory=set)
    """Names whose base values all processes have: where a model is sharded, the first one alone has read them."""
    shown: dict[str, str | None] = field(default_factory=dict)
    """Whose values the model holds, by name; None for the base model's."""


def _heads(root: nn.Module) -> _Heads:
    return cast(_Heads, root.__dict__.setdefault(_HEADS, _Heads()))


def keep_base_heads(root: nn.Module, trained: Sequence[str]) -> None:
    """Keep the base model's values of what an adapter is to train, where they are not kept yet.

    Args:
        root: the model; adapters that are in it already may show values of their own.
        trained: names of parameters.
    """
    heads = _heads(root)
    for name in with_buffers(root, trained):
        if name not in heads.base:
            heads.base[name], heads.shown[name] = _copy(_tensor(root, name)), None


def show_heads(root: nn.Module, names: Sequence[str], trained: Collection[str] | None = None) -> None:
    """Put those heads into the model that belong to the last of these adapters, or else to the base model.

    A head trains where the adapter that it belongs to trains. An adapter's head starts as the base model's.

    Args:
        root: the model.
        names: adapters, in the order in which they are active.
        trained: those that train; None looks.
    """
    owned = {name: set(with_buffers(root, records(root)[name].trained)) for name in names}
    shown = _heads(root).shown
    _show(root, {key: next((name for name in reversed(names) if key in owned[name]), None) for key in shown}, trained)


def _show(root: nn.Module, owners: Mapping[str, str | None], trained: Collection[str] | None = None) -> None:
    """Put the values of these owners into the model."""
    heads = _heads(root)
    for key, owner in owners.items():
        before = heads.shown[key]
        if owner == before:
            continue
        tensor = _tensor(root, key)
        if before is not None:
            heads.waiting[before, key] = _copy(tensor)
        own = None if owner is None else heads.waiting.pop((owner, key), None)
        _write(tensor, _base_value(heads, key, tensor) if own is None else own)
        heads.shown[key] = owner
        if isinstance(tensor, nn.Parameter):
            if trained is None and owner is not None:
                trained = {n for n in records(root) if any(map(trains, adapters_named(root, n).values()))}
            tensor.requires_grad_(owner in (trained or ()))


def trainable_heads(root: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that an adapter trains in full, as far as the model holds its values now."""
    shown = _heads(root).shown
    return [root.get_parameter(key) for key in records(root)[name].trained if shown.get(key, name) == name]


def waiting_heads(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Values of an adapter's heads that the model does not hold now, by their names in `module`, which contains it."""
    prefix, root = find_root(module)
    return {join(prefix, key): value for (owner, key), value in _heads(root).waiting.items() if owner == name}


@contextmanager
def heads_of(root: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside the block the model has the heads of these adapters, or the base model's; afterwards those of before."""
    before = dict(_heads(root).shown)
    trained = {key: tensor.requires_grad for key in before if isinstance(tensor := _tensor(root, key), nn.Parameter)}
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several:
        reshard(root)
    show_heads(root, names)
    try:
        yield
    finally:
        if several:
            reshard(root)  # a forward inside leaves whole tensors in the place of shards
        _show(root, before, trained=())
        for key, was in trained.items():
            root.get_parameter(key).requires_grad_(was)


def forget_heads(root: nn.Module, name: str) -> None:
    """Drop an adapter's heads, whose values are in the model no more, and the base model's that no other one trains."""
    heads = _heads(root)
    for owner, key in list(heads.waiting):
        if owner == name:
            del heads.waiting[owner, key]
    others = [other for other in records(root) if other != name]
    needed = {key for other in others for key in with_buffers(root, records(root)[other].trained)}
    for key in heads.base.keys() - needed:
        del heads.base[key], heads.shown[key]


def with_buffers(root: nn.Module, trained: Sequence[str]) -> list[str]:
    """Names of parameters, and of the persistent buffers of the modules that own them."""
    found: dict[str, None] = dict.fromkeys(trained)
    for owner in {name.rpartition(".")[0] for name in trained}:
        module = root.get_submodule(owner)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[join(owner, name)] = None
    return list(found)


def _tensor(root: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    module = root.get_submodule(owner)
    return cast(Tensor, module._parameters.get(leaf, module._buffers.get(leaf)))


def _base_value(heads: _Heads, key: str, tensor: Tensor) -> Tensor:
    """The base model's value; of a sharded tensor all processes ask, and the first one's is sent, once."""
    if isinstance(tensor, DTensor) and key not in heads.sent:
        value = heads.base[key]
        heads.base[key] = from_first(lambda: value)
        heads.sent.add(key)
    return heads.base[key]


def _copy(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory, of a sharded tensor of this process's shard."""
    if tensor.is_meta:
        return tensor.detach()
    return tensor.detach().to("cpu", copy=True)


@torch.no_grad()
def _write(tensor: Tensor, value: Tensor) -> None:
    """Write in place, so that an optimizer and a graph keep the tensor that they know."""
    if isinstance(value, DTensor):
        local(tensor.data).copy_(local(value))
    else:
        put(tensor.data, value)
