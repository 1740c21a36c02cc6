"""The adapter that is exported, and the model that names in the exported files are relative to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layer import AdaptedLayer
from lora_lightning.errors import AdapterStateError, ExportError, did_you_mean
from lora_lightning.injection import AdapterRecord, injected_root, iter_adapters, records
from lora_lightning.targets import pretrained_models


@dataclass(frozen=True)
class Source:
    """One injected adapter, seen from `host`."""

    root: nn.Module
    """The module that adapters were injected into."""
    host: nn.Module
    """The Hugging Face model inside it that holds everything trained, or `root` where there is no such model."""
    name: str
    record: AdapterRecord
    layers: dict[str, AdaptedLayer]
    """Layers that carry the adapter, by path in `host`."""
    trained: tuple[str, ...]
    """Parameters of `host` that train in full."""

    @property
    def method(self) -> str:
        """The method's name."""
        return type(self.record.method).__name__

    @property
    def kind(self) -> str:
        """The method's export class."""
        return type(self.record.method).export

    def adapter(self, path: str) -> Adapter:
        """The adapter on one layer."""
        return self.layers[path].adapter(self.name)


def find(model: nn.Module, name: str) -> Source:
    """The adapter called `name` in `model`.

    Raises:
        AdapterStateError: there is none.
        ExportError: the model is sharded.
    """
    root = injected_root(model)
    known = records(root)
    if name not in known:
        raise AdapterStateError(f'no adapter "{name}".{did_you_mean(name, known)} Installed: {", ".join(known)}.')
    if any(isinstance(parameter, DTensor) for parameter in root.parameters()):
        raise ExportError("the model is sharded; save_adapter writes it whole, and that folder can be exported.")
    layers = {path: layer for path, layer in iter_adapters(root) if name in layer.adapters}
    record = known[name]
    prefix, host = _host(root, [*layers, *record.trained])
    return Source(
        root=root,
        host=host,
        name=name,
        record=record,
        layers={path.removeprefix(prefix): layer for path, layer in layers.items()},
        trained=tuple(parameter.removeprefix(prefix) for parameter in record.trained),
    )


def _host(root: nn.Module, paths: Iterable[str]) -> tuple[str, nn.Module]:
    for path, model in pretrained_models(root):
        prefix = f"{path}." if path else ""
        if all(inner.startswith(prefix) for inner in paths):
            return prefix, model
    return "", root


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules under the paths they have without adapters; an adapted layer counts as its base."""
    found: dict[str, nn.Module] = {}
    inside = "\0"
    for path, module in model.named_modules(remove_duplicate=False):
        if path.startswith(inside):
            continue
        found[path] = module
        if isinstance(module, AdaptedLayer):
            found[path], inside = module.base, f"{path}."
    return found


def users(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each parameter is used, base layers under their plain names, by the parameter's id."""
    found: dict[int, list[str]] = {}
    for path, module in plain_modules(model).items():
        for leaf, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append(f"{path}.{leaf}" if path else leaf)
    return found


def ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Path of each adapted layer whose weight has other users, with those."""
    by_parameter = users(model)
    found = {}
    for path, layer in iter_adapters(model):
        others = [name.removesuffix(".weight") for name in by_parameter[id(layer.accessor.stored)]]
        if len(others) > 1:
            found[path] = tuple(name for name in others if name != path)
    return found


def check_finite(what: str, tensors: Iterable[Tensor]) -> None:
    """Raise `ExportError` if a number is NaN or infinite."""
    for tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ExportError(f"{what} holds values that are not finite; nothing was written.")
