"""The base layer of a layer, whoever provides its kind: plugins are asked first, then core."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

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
    return plugin_base_layer(module) or core_base_layer(module)


def plugin_base_layer(module: nn.Module) -> BaseLayer | None:
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


def count_numbers(parameters: Mapping[str, nn.Parameter], quantized: Mapping[str, QuantizedBase]) -> int:
    """Numbers that parameters hold, however many of a quantized weight share a byte; quantized layers by path."""
    total = 0
    for name, parameter in parameters.items():
        layer, _, leaf = name.rpartition(".")
        base = quantized.get(layer.removesuffix(".base")) if leaf == "weight" else None
        total += parameter.numel() if base is None else base.d_in * base.d_out
    return total
