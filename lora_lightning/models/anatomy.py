"""What a model is made of: `survey` walks it once, and every step of an operation asks the answer.

    anatomy = survey(model)
    anatomy.layers             what can take an adapter, and what cannot
    anatomy.adapted            what has one
    anatomy.heads              what a task has outside the backbone
    anatomy.scopes             attention, mlp, vision, ...

Every path is a module's first one. What stands in several places comes once, and `places` names all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.adapters.layers.quantized import QuantizedBase
from lora_lightning.distributed import reshard_all
from lora_lightning.models.base_layers import plugin_base_layer
from lora_lightning.models.experts import (
    alone,
    expert_parameters,
    is_alone,
    single,
    stack,
    stands_for_parameter,
)
from lora_lightning.models.heads import head_prefixes, output_layers, outside_backbone
from lora_lightning.models.new_tokens import ExtendedLayer
from lora_lightning.models.paths import join, places, segments
from lora_lightning.models.scopes import Scopes, pretrained_models
from lora_lightning.models.weight_readers import weight_read_layers

Heads = Literal["heads", "all"] | Sequence[str]
_ROUTER_NAMES = ("router", "gate", "shared_expert_gate")


class Layer(NamedTuple):
    """A module, or an expert parameter as one, and its base layer where it can take an adapter."""

    module: nn.Module
    base: BaseLayer | None


@dataclass(frozen=True, eq=False, repr=False)
class Anatomy:
    """What a model was made of when it was surveyed.

    The four fields come from the one walk; everything else is worked out from them when it is first asked for. So the
    answers stay those of that moment: after `inject`, `eject` or `add_rows`, `modules` still holds the plain layers,
    and neither new adapters nor new rows are known. What goes on from there takes a second survey, or adds what it has
    changed itself, as `place_adapters` does. Values of tensors are read when they are used, and are never stale.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    """Every module by path; "" is the model."""
    places: Mapping[int, Sequence[tuple[nn.Module, str]]]
    """Every (parent, name) under which a module stands, by the module's id."""
    parameters: Mapping[str, nn.Parameter]
    """Every parameter by name; one that has several names under the first."""

    # -- layers --------------------------------------------------------------------------------------------------------

    @cached_property
    def adapted(self) -> dict[str, AdaptedLayer]:
        """Layers that have adapters."""
        return {path: module for path, module in self.modules.items() if isinstance(module, AdaptedLayer)}

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Every module but lists and the model itself, and parameters that their owner reads and that can be layers.

        These are expert parameters whose layout is known, and parameters alone.

        Of an adapted layer it is what the adapter is on. What lies inside an adapted layer, or inside one with rows of
        new tokens, is left out.
        """
        found: dict[str, Layer] = {}
        extended = "\0"
        for path, module in self._outside_adapted.items():
            if path.startswith(extended):
                continue
            if isinstance(module, AdaptedLayer):
                found[path] = Layer(module.base, module.base_layer)
                continue
            if isinstance(module, ExtendedLayer):
                extended = f"{path}."
                found[path] = Layer(module, None)
            elif path and not isinstance(module, nn.ModuleList):
                found[path] = Layer(module, self._plugin_bases.get(path) or core_base_layer(module))
            for name in expert_parameters(path, module):
                held = stack(module, name)
                if held is not None:
                    found[join(path, name)] = Layer(held, core_base_layer(held))
            if not isinstance(module, ExtendedLayer) and (path not in found or found[path].base is None):
                for name in alone(module):
                    if join(path, name) not in found and len(self.users[id(module._parameters[name])]) == 1:
                        held = single(module, name)
                        found[join(path, name)] = Layer(held, core_base_layer(held))
        return found

    @cached_property
    def adaptable(self) -> dict[str, BaseLayer]:
        """Base layers of those `layers` that can take an adapter, parameters alone left out."""
        return {path: base for path, base in self.reachable.items() if not is_alone(base.module)}

    @cached_property
    def reachable(self) -> dict[str, BaseLayer]:
        """As `adaptable`, with the parameters that only their name reaches."""
        return {path: layer.base for path, layer in self.layers.items() if layer.base is not None}

    @cached_property
    def quantized(self) -> dict[str, QuantizedBase]:
        """Quantized layers, adapted ones too, each as it is without adapters."""
        found = {}
        for path, module in self._outside_adapted.items():
            base = module.base_layer if isinstance(module, AdaptedLayer) else self._plugin_bases.get(path)
            if isinstance(base, QuantizedBase):
                found[path] = base
        return found

    @property
    def formats(self) -> str | None:
        """Names of the formats that weights are stored in, joined; None for a plain model."""
        return ", ".join(sorted({base.format for base in self.quantized.values()})) or None

    @cached_property
    def fused(self) -> list[str]:
        """Expert parameters, which hold one matrix an expert in three axes; adapted ones too."""
        found = []
        for path, module in self._outside_adapted.items():
            if isinstance(module, AdaptedLayer):
                if stands_for_parameter(module) and not is_alone(module.base):
                    found.append(path)
                continue
            if self.layers.get(path, Layer(module, None)).base is None:
                found += [join(path, name) for name in expert_parameters(path, module)]
        return found

    @cached_property
    def extended(self) -> dict[str, ExtendedLayer]:
        """Layers with rows of new tokens."""
        return {path: module for path, module in self.modules.items() if isinstance(module, ExtendedLayer)}

    @cached_property
    def row_names(self) -> list[str]:
        """Names of the parameters that hold rows of new tokens; shared ones once."""
        return [name for path in self.extended if (name := f"{path}.new_rows") in self.parameters]

    def weight_read(self, paths: Iterable[str]) -> dict[str, str]:
        """Those layers at `paths` whose weight their owner reads instead of calling them, with the owner's class."""
        layers = list(paths)
        bare = [path for path in layers if path in self.layers and is_alone(self.layers[path].module)]
        found = {path: type(self._parent(path)).__name__ for path in bare}
        return found | weight_read_layers(self.modules, (path for path in layers if path not in found))

    # -- shared weights ------------------------------------------------------------------------------------------------

    @cached_property
    def users(self) -> dict[int, dict[str, str]]:
        """Names of each parameter, with the path of the module that uses it, by the parameter's id."""
        found: dict[int, dict[str, str]] = {}
        for path, module in self.modules.items():
            owner = path.removesuffix(".base")
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    found.setdefault(id(parameter), {})[join(path, name)] = owner
        return found

    def tied(self, layers: Mapping[str, BaseLayer]) -> dict[str, tuple[str, ...]]:
        """Path of each of `layers` whose weight another module uses too, with the paths of those."""
        found = {}
        for path, base in layers.items():
            own = (base.weight_name(path), f"{path}.base.weight")
            others = tuple(owner for name, owner in self.users[id(base.stored)].items() if name not in own)
            if others:
                found[path] = others
        return found

    # -- what a pretrained model says of itself ------------------------------------------------------------------------

    @cached_property
    def pretrained(self) -> dict[str, nn.Module]:
        """Hugging Face models, outermost only; "" is the model itself."""
        return pretrained_models(self.modules)

    @cached_property
    def scopes(self) -> Scopes:
        """Parts of blocks, and towers."""
        return Scopes(self.pretrained, self.modules)

    @cached_property
    def heads(self) -> list[str]:
        """Paths of task heads: what lies outside the backbone, and poolers."""
        return head_prefixes(self.pretrained, self.modules)

    @cached_property
    def output_layers(self) -> list[str]:
        """Paths of the output layers of language models."""
        return output_layers(self.pretrained, self.modules)

    @cached_property
    def protected(self) -> dict[str, str]:
        """Paths that a pattern must name to reach, with what they are: heads, poolers and routers."""
        found = {
            join(path, name): "head" for path, model in self.pretrained.items() for name in outside_backbone(model)
        }
        found |= dict.fromkeys((path for path in self.heads if segments(path)[-1] != "pooler"), "head")
        found |= dict.fromkeys(self.output_layers, "head")
        for path in self.modules:
            name = segments(path)[-1]
            if name == "pooler" or (name == "head" and self.scopes.tower(path) == "vision"):
                found[path] = "pooler"
            elif name == "router" or (name in _ROUTER_NAMES and hasattr(self._parent(path), "experts")):
                found[path] = "router"
        return found

    # -- tensors -------------------------------------------------------------------------------------------------------

    @cached_property
    def sharded(self) -> bool:
        """Whether a parameter is sharded on several processes."""
        return any(isinstance(parameter, DTensor) for parameter in self.parameters.values())

    @cached_property
    def weights_dtype(self) -> torch.dtype:
        """Data type of the first plain floating-point weight outside adapters; float32 where there is none."""
        for name, parameter in self.parameters.items():
            if parameter.is_floating_point() and type(parameter.data) is Tensor and ".adapters." not in name:
                return parameter.dtype
        return torch.float32

    @property
    def frozen_bytes(self) -> int:
        """Bytes that frozen parameters hold, scales of quantized weights included."""
        quantized = {id(base.stored): base for base in self.quantized.values()}
        total = 0
        for parameter in self.parameters.values():
            if not parameter.requires_grad:
                base = quantized.get(id(parameter))
                total += parameter.numel() * parameter.element_size() if base is None else base.held
        return total

    # -- helpers -------------------------------------------------------------------------------------------------------

    @cached_property
    def _outside_adapted(self) -> dict[str, nn.Module]:
        """Modules that are not inside an adapted layer; that layer itself is one of them."""
        found, inside = {}, "\0"
        for path, module in self.modules.items():
            if path.startswith(inside):
                continue
            if isinstance(module, AdaptedLayer):
                inside = f"{path}."
            found[path] = module
        return found

    @cached_property
    def _plugin_bases(self) -> dict[str, BaseLayer]:
        """Base layers that plugins have for plain modules.

        A quantized layer that does not tell its plain dtype takes that of the model's weights.
        """
        found = {}
        for path, module in self._outside_adapted.items():
            base = None if isinstance(module, AdaptedLayer) else plugin_base_layer(module)
            if base is None:
                continue
            if isinstance(base, QuantizedBase) and base.plain_dtype is None:
                base.adopt(self.weights_dtype)
            found[path] = base
        return found

    def _parent(self, path: str) -> nn.Module:
        return self.modules[path.rpartition(".")[0]]


def survey(model: nn.Module) -> Anatomy:
    """Walk `model` once and keep what was found; see `Anatomy` for how long that holds.

    Of a sharded model, what a forward has left gathered is given back first: only shards can be read and written.
    """
    modules = dict(model.named_modules())
    reshard_all(modules.values())
    parameters: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameters.setdefault(id(parameter), (join(path, name), parameter))
    return Anatomy(model, modules, places(modules.values()), dict(parameters.values()))
