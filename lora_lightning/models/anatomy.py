"""What a model is made of: layers with their base_layers, fused experts, routers, shared weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast

from torch import nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.models.base_layers import base_layer_in
from lora_lightning.models.experts import expert_parameters, stack, stands_for_parameter
from lora_lightning.models.heads import output_embeddings, segments
from lora_lightning.models.new_tokens import ExtendedLayer
from lora_lightning.models.scopes import Scopes, join, pretrained_models

Heads = Literal["heads"] | Sequence[str]
_ROUTER_NAMES = ("router", "gate", "shared_expert_gate")


def protected_layers(model: nn.Module, scopes: Scopes) -> dict[str, str]:
    """Paths that a pattern must name to reach, with what they are."""
    protected: dict[str, str] = {}
    for path, hf_model in pretrained_models(model):
        backbone = cast(str, hf_model.base_model_prefix)
        if hasattr(hf_model, backbone):
            protected |= {join(path, name): "head" for name, _ in hf_model.named_children() if name != backbone}
        output = output_embeddings(hf_model)
        protected |= {join(path, name): "head" for name, module in hf_model.named_modules() if module is output}
    for path, _ in model.named_modules():
        name = segments(path)[-1]
        parent = model.get_submodule(path.rpartition(".")[0])
        if name == "pooler" or (name == "head" and scopes.tower(path) == "vision"):
            protected[path] = "pooler"
        elif name == "router" or (name in _ROUTER_NAMES and hasattr(parent, "experts")):
            protected[path] = "router"
    return protected


def fused_experts(model: nn.Module) -> list[str]:
    """Paths of 3-D expert parameters, which hold one matrix an expert; adapted ones too."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer) and stands_for_parameter(module):
            found.append(path)
        elif base_layer_in(model, module) is None:
            found += [join(path, name) for name in expert_parameters(path, module)]
    return found


def all_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, BaseLayer | None]]:
    """Every module, and every expert parameter, by path, with the base layer of those that can take an adapter.

    For adapted ones it is the base layer that is there, and what lies inside them is left out.
    """
    inside: str | None = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        if isinstance(module, AdaptedLayer):
            inside = f"{path}."
            yield path, module.base, module.base_layer
            continue
        if isinstance(module, ExtendedLayer):
            inside = f"{path}."
            yield path, module, None
        elif path and not isinstance(module, nn.ModuleList):
            yield path, module, base_layer_in(model, module)
        for name in expert_parameters(path, module):
            held = stack(module, name)
            if held is not None:
                yield join(path, name), held, core_base_layer(held)


def other_users(model: nn.Module, layers: Mapping[str, BaseLayer]) -> dict[str, tuple[str, ...]]:
    """Path of each layer whose weight another module uses too, with the paths of those."""
    users: dict[int, dict[str, str]] = {}
    for path, module in model.named_modules():
        owner = path.removesuffix(".base")
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), {})[join(path, name)] = owner
    found = {}
    for path, base in layers.items():
        own = (base.weight_name(path), f"{path}.base.weight")
        others = tuple(owner for name, owner in users[id(base.stored)].items() if name not in own)
        if others:
            found[path] = others
    return found
