"""Running statistics of frozen layers: a batch normalisation whose parameters do not train keeps its statistics.

They are buffers, which training moves and no adapter file holds. Where a layer's own parameters train (`also_train`),
its statistics train too, and are saved beside them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.models.anatomy import Anatomy


def layers_with_statistics(anatomy: Anatomy) -> dict[str, nn.Module]:
    """Layers that keep running statistics, by path."""
    return {path: module for path, module in anatomy.modules.items() if _has_statistics(module)}


def _has_statistics(module: nn.Module) -> bool:
    """Whether it has a running mean; or, without parameters, saved buffers and a forward that asks if it trains.

    The latter of transformers' own modules only, such as I-BERT's of the ranges of activations: elsewhere it may be
    noise that training wants.
    """
    if module._buffers.get("running_mean") is not None:
        return True
    if not type(module).__module__.startswith("transformers."):
        return False
    saved = module._buffers.keys() - module._non_persistent_buffers_set
    asks = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    return bool(saved) and "training" in asks and next(module.parameters(), None) is None


def hold_statistics(anatomy: Anatomy) -> None:
    """Let every layer with running statistics evaluate while its parameters are frozen."""
    for module in layers_with_statistics(anatomy).values():
        if evaluate_if_frozen not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(evaluate_if_frozen)


def release_statistics(anatomy: Anatomy) -> None:
    """Let these layers train and evaluate as they are told again."""
    for module in anatomy.modules.values():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is evaluate_if_frozen:
                del module._forward_pre_hooks[key]


def evaluate_if_frozen(module: nn.Module, _: Any) -> None:
    """Before a forward: leave training mode where no parameter of the layer trains; a layer without any never does."""
    if module.training and not any(p.requires_grad for p in module._parameters.values() if p is not None):
        module.training = False
