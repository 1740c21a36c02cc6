"""Which tensors of a model belong to its adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.injection.records import find_root, records
from lora_lightning.models.anatomy import Anatomy, survey
from lora_lightning.models.paths import join, starting_with


def adapter_keys(model: nn.Module, name: str | None = None) -> list[str]:
    """State-dict keys that belong to adapters: all tensors below them, and heads that train in full.

    Args:
        model: a module with adapters, or one that contains it.
        name: one adapter; None for all.
    """
    return list(adapter_state(model, name))


def adapter_state(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Tensors that belong to adapters by state-dict key, as `adapter_keys`; of a sharded model its shards."""
    prefix, root = find_root(model)
    state = surveyed_state(survey(root), list(records(root)) if name is None else [name])
    return {join(prefix, key).replace("_fsdp_wrapped_module.", ""): tensor for key, tensor in state.items()}


def surveyed_state(anatomy: Anatomy, names: Sequence[str]) -> dict[str, Tensor]:
    """As `adapter_state`, of a model with adapters that has been surveyed."""
    trained = {parameter for name in names for parameter in records(anatomy.model)[name].trained}
    owners = {f"{parameter.rpartition('.')[0]}." for parameter in trained if "." in parameter}
    at_or_below_owner = starting_with(owners, (f"{path}." for path in anatomy.modules))
    found: dict[str, Tensor] = {}
    for path, module in anatomy.modules.items():
        if isinstance(module, AdaptedLayer):
            found |= _layer_state(path, module, names)
            continue
        for key, parameter in _present(path, module._parameters.items()):
            if key in trained:
                found[key] = parameter
        if f"{path}." in at_or_below_owner:
            found |= _persistent_buffers(path, module)
    for name in names:
        for owner in records(anatomy.model)[name].linked:
            path = join(owner, "adapters", name)
            found |= _module_state(path, anatomy.modules[path])
    return {key: tensor.detach() for key, tensor in found.items()}


def _layer_state(path: str, layer: AdaptedLayer, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of adapters of these names and of what they have folded, where they lie; nothing is gathered."""
    found: dict[str, Tensor] = {}
    for part, kept in (("adapters", layer.adapters), ("shifts", layer.shifts)):
        for name in names:
            if name in kept:
                found |= _module_state(join(path, part, name), kept[name])
    return found


def _module_state(path: str, module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers at and below a module."""
    found: dict[str, Tensor] = {}
    for inside, part in module.named_modules(prefix=path, remove_duplicate=False):
        found.update(_present(inside, part._parameters.items()))
        found |= _persistent_buffers(inside, part)
    return found


def _persistent_buffers(path: str, module: nn.Module) -> dict[str, Tensor]:
    left_out = module._non_persistent_buffers_set
    return dict(_present(path, ((name, value) for name, value in module._buffers.items() if name not in left_out)))


def _present(path: str, tensors: Iterable[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if tensor is not None:
            yield join(path, name), tensor
