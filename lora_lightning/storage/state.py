"""Which tensors of a model belong to its adapters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lora_lightning.injection.records import (
    injected_root,
    iter_adapters,
    records,
)
from lora_lightning.models.paths import starting_with

_PARTS = ("adapters", "shifts")


def adapter_keys(model: nn.Module, name: str | None = None) -> list[str]:
    """State-dict keys that belong to adapters: all tensors below them, and heads that train in full.

    Args:
        model: a module with adapters, or one that contains it.
        name: one adapter; None for all.
    """
    return list(adapter_state(model, name))


def adapter_state(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Tensors that belong to adapters by state-dict key, as `adapter_keys`; of a sharded model its shards."""
    root = injected_root(model)
    prefix = next(path for path, module in model.named_modules() if module is root)
    names = list(records(root)) if name is None else [name]
    inside = [f"{path}.{part}.{own}." for path, _ in iter_adapters(root) for own in names for part in _PARTS]
    inside += [f"{path}.adapters.{own}.".removeprefix(".") for own in names for path in records(root)[own].linked]
    heads = {parameter for adapter in names for parameter in records(root)[adapter].trained}
    owners = {parameter.rpartition(".")[0] for parameter in heads}
    buffers = {f"{owner}.{buffer}" for owner in owners for buffer, _ in root.get_submodule(owner).named_buffers()}
    state = dict(_state(root))
    own = starting_with(inside, state) | heads | buffers
    found = {f"{prefix}.{key}" if prefix else key: tensor.detach() for key, tensor in state.items() if key in own}
    return {key.replace("_fsdp_wrapped_module.", ""): tensor for key, tensor in found.items()}


def _state(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a state dict of `root` names, where it lies; nothing is gathered."""
    for path, module in root.named_modules(remove_duplicate=False):
        persistent = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in (module._parameters | persistent).items():
            if tensor is not None:
                yield f"{path}.{key}" if path else key, tensor
