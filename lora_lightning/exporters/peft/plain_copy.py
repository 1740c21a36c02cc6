"""The base model of an adapter, as a loader of the export would have it, beside the adapted one in memory.

Weights are shared with the adapted model. What the export brings (heads, rows of new tokens, trained biases) is NaN in
the copy, so that a loader that leaves it out is noticed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.layers.kinds import ExpertStack
from lora_lightning.adapters.linked import LinkedAdapters
from lora_lightning.exporters.peft.read_heads import tensors_of
from lora_lightning.exporters.source import Source
from lora_lightning.injection.records import records
from lora_lightning.models import experts
from lora_lightning.models.new_tokens import extended_layers, remove_rows
from lora_lightning.models.paths import unwrap
from lora_lightning.models.untied import retie, untied


class CopyError(Exception):
    """A model holds what cannot be copied."""


@contextmanager
def plain_copy(source: Source, brought: Iterable[str]) -> Iterator[nn.Module]:
    """The base model inside the block; the adapted one is as before afterwards.

    Args:
        source: the adapter.
        brought: names of the base model's tensors that the export has.

    Raises:
        CopyError: the model cannot be copied.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in source.host.parameters()]
    try:
        try:
            plain = _without_adapters(source)
        except Exception as error:
            raise CopyError(
                f"{type(source.host).__name__} cannot be copied ({type(error).__name__}: {error})"
            ) from error
        retie(plain, set(brought))  # as the base model lies on the disk
        _spoil(plain, brought, alone=untied(source.anatomy.model) is not None)
        state = tensors_of(plain)
        for path, (ids, _) in source.rows.items():
            with torch.no_grad():
                state[f"{path}.weight"][list(ids)] = torch.nan
        yield plain.eval()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _without_adapters(source: Source) -> nn.Module:
    model = unwrap(source.host)
    memo: dict[int, Any] = {id(tensor): _alias(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    for layer in layers:  # first all weights, which other layers may share
        memo |= _originals(layer)
    memo |= {id(layer): _base_of(layer, memo) for layer in layers}
    plain = copy.deepcopy(model, memo)
    extended = list(extended_layers(plain).values())
    size = max((one.num_embeddings for one in extended if one.new_rows is not None), default=0)
    for one in extended:
        one.set_token_rows((), None)
    remove_rows(plain)
    if size:  # as a caller makes room before peft opens the export
        cast(Any, plain).resize_token_embeddings(size, mean_resizing=False)
    records(plain).clear()
    for module in list(plain.modules()):
        if isinstance(module._modules.get("adapters"), LinkedAdapters):
            del module._modules["adapters"]
        for name, child in list(module._modules.items()):
            if isinstance(child, ExpertStack) and child.owned:
                delattr(module, name)
                experts.restore(module, name, child)
    return plain


def _alias(tensor: Tensor) -> Tensor:
    """The same numbers in a parameter of its own; one of another class, such as a quantized one, stays itself."""
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor


def _module_of(layer: AdaptedLayer) -> nn.Module:
    return layer.base if layer.merging.stand_in is None else layer.base_layer.module


def _originals(layer: AdaptedLayer) -> dict[int, Tensor]:
    """A layer's own tensors before any merge or fold, by the ids of those that it holds."""
    held = _module_of(layer)._parameters
    originals = layer.originals() if layer.rewritten else {}
    return {
        id(own): nn.Parameter(originals[name].detach().to(own.device), requires_grad=False)
        for name, own in held.items()
        if own is not None and name in originals
    }


def _base_of(layer: AdaptedLayer, memo: dict[int, Any]) -> nn.Module:
    """The plain layer; a bias that only a merge has given it is left out."""
    plain = copy.copy(_module_of(layer))
    added = {name for name in plain._parameters if layer.rewritten and name not in layer.originals()}
    plain._parameters = {
        name: None if own is None or name in added else memo[id(own)] for name, own in plain._parameters.items()
    }
    return plain


def _spoil(model: nn.Module, names: Iterable[str], alone: bool) -> None:
    """Put NaN in the place of tensors, in every module that shares them, unless the export means them `alone`."""
    state = tensors_of(model)
    if alone:
        for name in set(names) & state.keys():
            owner, _, leaf = name.rpartition(".")
            if leaf in (module := model.get_submodule(owner))._parameters:
                module._parameters[leaf] = nn.Parameter(torch.full_like(state[name], torch.nan), requires_grad=False)
        return
    wanted = {id(state[name]): state[name] for name in names if name in state}
    bad = {key: torch.full_like(own, torch.nan) for key, own in wanted.items() if own.is_floating_point()}
    fresh = {key: nn.Parameter(t, requires_grad=False) for key, t in bad.items() if type(wanted[key]) is nn.Parameter}
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None and id(own) in fresh:
                module._parameters[name] = fresh[id(own)]
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in bad:
                module._buffers[name] = bad[id(buffer)]
