"""The base layer of a layer, whoever provides its kind: plugins are asked first, then core."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.adapters.layers.quantized import QuantizedBase
from lora_lightning.errors import PluginError, TargetError
from lora_lightning.plugins import base_layer_kinds, registry


def base_layer_of(module: nn.Module) -> BaseLayer | None:
    """The base layer for a module, or None where no kind serves it.

    Raises:
        PluginError: several plugins serve it, or one answers something else than a base layer.
    """
    return _brought(module) or core_base_layer(module)


def _brought(module: nn.Module) -> BaseLayer | None:
    """The base layer that a plugin has for a module."""
    found: dict[str, BaseLayer] = {}
    for plugin, kind in base_layer_kinds(registry()):
        base = kind(module)
        if isinstance(base, BaseLayer):
            found[plugin] = base
        elif base is not None:
            raise PluginError(f"{plugin}: lora_lightning_base_layers made {base!r} of a {type(module).__name__}.")
    if len(found) > 1:
        one, other, *_ = found
        raise PluginError(
            f"{type(module).__name__} is served by {' and '.join(found)}; leave one out with -p no:{one} or "
            f"-p no:{other}."
        )
    return next(iter(found.values()), None)


def base_layer_in(model: nn.Module, module: nn.Module) -> BaseLayer | None:
    """As `base_layer_of`; a quantized layer that does not tell its plain dtype takes that of the model's weights."""
    return _adopted(model, _brought(module)) or core_base_layer(module)


def _adopted(model: nn.Module, base: BaseLayer | None) -> BaseLayer | None:
    if isinstance(base, QuantizedBase) and base.plain_dtype is None:
        base.adopt(weights_dtype(model))
    return base


def weights_dtype(model: nn.Module) -> torch.dtype:
    """Data type of the first plain floating-point weight outside adapters; float32 where there is none."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and type(parameter.data) is Tensor and ".adapters." not in name:
            return parameter.dtype
    return torch.float32


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedBase]]:
    """Quantised layers by path, adapted ones too, each as it is without adapters."""
    inside: str | None = None
    base: BaseLayer | None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        if isinstance(module, AdaptedLayer):
            inside, base = f"{path}.", module.base_layer
        else:
            base = _adopted(model, _brought(module))
        if isinstance(base, QuantizedBase):
            yield path, base


def quantized_formats(model: nn.Module) -> str | None:
    """Names of the formats that the model's weights are stored in, joined; None for a plain model."""
    return ", ".join(sorted({base.format for _, base in quantized_layers(model)})) or None


def check_quantized(quantized: Mapping[str, QuantizedBase], trained: Sequence[str], adapted: Iterable[str]) -> None:
    """Refuse what quantized layers cannot do.

    Args:
        quantized: quantized layers by path.
        trained: names of base parameters that train in full.
        adapted: paths of the layers that get an adapter.

    Raises:
        TargetError: a quantized weight would train, or a layer without an adapter would stop the gradient.
    """
    for name in trained:
        base = quantized.get(name.removesuffix(".weight"))
        if base is not None:
            raise TargetError(
                f"{name} is stored as {base.format}, so it cannot train in full: load the model with that layer left "
                "as it is (llm_int8_skip_modules, modules_to_not_convert), or name other layers in also_train."
            )
    bare = [path for path in quantized.keys() - set(adapted) if not quantized[path].differentiable]
    if bare:
        raise TargetError(
            f"{min(bare)} is stored as {quantized[min(bare)].format}, whose product has no backward, and gets no "
            'adapter, which would stop the gradient there: adapt it as well (targets="all-linear"), or load it '
            "unquantized."
        )


def kind_of(base: BaseLayer) -> str:
    """The kind of a layer for people, with the format of its weight."""
    return f"{base.kind}, {base.format}" if isinstance(base, QuantizedBase) else base.kind


def frozen_bytes(model: nn.Module) -> int:
    """Bytes that frozen parameters hold, scales of quantized weights included."""
    quantized = {id(base.stored): base for _, base in quantized_layers(model)}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(quantized[id(p)].held if id(p) in quantized else p.numel() * p.element_size() for p in frozen)


def count_numbers(model: nn.Module, quantized: Mapping[str, QuantizedBase]) -> int:
    """Numbers that the parameters of `model` hold, however many of a quantized weight share a byte."""
    total = 0
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        base = quantized.get(layer.removesuffix(".base")) if leaf == "weight" else None
        total += parameter.numel() if base is None else base.d_in * base.d_out
    return total
