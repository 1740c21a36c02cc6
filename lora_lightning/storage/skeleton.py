"""A second model to try an adapter file on: the same modules without adapters, without new rows, and without values."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.layers.kinds import ExpertStack, core_base_layer
from lora_lightning.adapters.linked import LinkedAdapters
from lora_lightning.models.anatomy import Anatomy, survey
from lora_lightning.models.experts import stands_for_parameter
from lora_lightning.models.new_tokens import ExtendedLayer, buffers_before
from lora_lightning.models.paths import unwrap
from lora_lightning.models.untied import say_tied, untied

_OURS = "_lora_lightning_"
_KEPT = f"{_OURS}skeleton"


def skeleton(anatomy: Anatomy) -> nn.Module:
    """The model as it was before `inject` and `add_rows`, its parameters and buffers on the meta device.

    Modules are new objects, and so is the model's configuration; what else they refer to is shared. A layer that only
    shows by its values that it can take an adapter (quantized, or with a forward of its own) is the model's own.
    """
    copies, apart = _Copies(anatomy), untied(anatomy.model)
    if apart is not None:
        output, embedding = (_weight(anatomy.modules[path]) for path in (apart.output, apart.embedding))
        copies.tensors[id(output)] = copies.tensor(embedding)
    found = copies.module(anatomy.model)
    for name, buffer in buffers_before(anatomy.model).items():
        owner, _, leaf = name.rpartition(".")
        found.get_submodule(owner)._buffers[leaf] = copies.tensor(buffer)
    config = getattr(found, "config", None)
    if hasattr(config, "get_text_config"):
        found.__dict__["config"] = copy.deepcopy(config)  # the number of tokens is written there
    if apart is not None:
        host: Any = found.get_submodule(apart.host)
        host.__dict__["config"] = copy.deepcopy(host.config)
        say_tied(host, apart)
    return found


def _weight(module: nn.Module) -> Tensor:
    """The pretrained weight of an embedding or output layer, adapted or not."""
    while isinstance(module, AdaptedLayer | ExtendedLayer):
        module = module.base_layer.module if isinstance(module, AdaptedLayer) else module.base
    return cast(Tensor, module.weight)


def keep_skeleton(model: nn.Module) -> None:
    """Remember the skeleton of a model whose parameters will not be readable any more, as under FSDP1."""
    model.__dict__[_KEPT] = skeleton(survey(model))


def new_skeleton(anatomy: Anatomy) -> nn.Module:
    """A skeleton of the model, or of the one that `keep_skeleton` has remembered."""
    kept = unwrap(anatomy.model).__dict__.get(_KEPT)
    return skeleton(anatomy if kept is None else survey(kept))


class _Copies:
    """Copies of modules and tensors, one each."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, Any] = {}
        for layer in anatomy.adapted.values():
            base = layer.base_layer.module
            if core_base_layer(self._copy(base)) is None:
                self.modules[id(base)] = base
        self.modules |= {id(base.module): base.module for base in anatomy.quantized.values()}
        for base in self.modules.values():
            self.tensors.update({id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})

    def module(self, module: nn.Module) -> nn.Module:
        """The copy of a module; of a layer with adapters or new rows, of the layer inside."""
        if isinstance(module, AdaptedLayer):
            made = self.module(module.base_layer.module)
            if "bias" not in module.originals() and made._parameters.get("bias") is not None:
                made._parameters["bias"] = None  # a merge has made it
            return made
        if isinstance(module, ExtendedLayer):
            return self.module(module.base)
        if id(module) not in self.modules:
            self.modules[id(module)] = self._copy(module)
        return self.modules[id(module)]

    def _copy(self, module: nn.Module) -> nn.Module:
        cls = type(module)
        made: nn.Module = object.__new__(cls.__mro__[2] if FSDPModule in cls.__bases__ else cls)
        for key, value in module.__dict__.items():
            if not key.startswith(_OURS):
                made.__dict__[key] = value.copy() if key.endswith("_hooks") and isinstance(value, dict) else value
        made.__dict__["_parameters"] = {key: self.tensor(value) for key, value in module._parameters.items()}
        made.__dict__["_buffers"] = {key: self.tensor(value) for key, value in module._buffers.items()}
        made.__dict__["_modules"] = children = {}
        for key, child in module._modules.items():
            if isinstance(child, AdaptedLayer) and stands_for_parameter(child):
                own = {**made._parameters, key: self.tensor(cast(ExpertStack, child.base).weight)}
                order: tuple[str, ...] = cast(ExpertStack, child.base).siblings
                made.__dict__["_parameters"] = dict(sorted(own.items(), key=lambda item: order.index(item[0])))
            elif not isinstance(child, LinkedAdapters):
                children[key] = None if child is None else self.module(child)
        return made

    def tensor(self, tensor: Any) -> Any:
        """The copy of a tensor without values; of a shard, of the whole tensor."""
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in self.tensors:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            self.tensors[id(tensor)] = (
                nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
            )
        return self.tensors[id(tensor)]
