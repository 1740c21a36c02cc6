"""State dictionaries of an adapted layer: they hold the original weight, whatever the layer holds now."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_originals_in_state(layer: nn.Module) -> None:
    """Have `state_dict()` of an `AdaptedLayer` give the originals, and `load_state_dict` take them."""
    layer.register_state_dict_post_hook(_emit_originals)
    layer.register_load_state_dict_pre_hook(_expect_originals)
    layer.register_load_state_dict_post_hook(_write_after_loading)


def _emit_originals(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    layer: Any = module  # an AdaptedLayer, whose module imports this one
    if layer.merging.stand_in is not None:  # a plain layer in the place of a quantized one
        for key in [key for key in state if key.startswith(f"{prefix}base.")]:
            del state[key]
        layer.base_layer.module.state_dict(destination=state, prefix=f"{prefix}base.")
    elif layer.rewritten:
        state.pop(f"{prefix}base.bias", None)  # the originals may have none
        state.update({f"{prefix}base.{name}": tensor for name, tensor in layer.originals().items()})


def _expect_originals(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Make room for what `state` holds: folded updates of its shapes, and a weight that is an original."""
    layer: Any = module  # an AdaptedLayer, whose module imports this one
    own = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    if own:
        layer.merging.check_unmerged()
    for name in layer.adapters:
        if any(key.startswith(f"adapters.{name}.") for key in own):
            inside = f"shifts.{name}."
            tensors = {key.removeprefix(inside): state[prefix + key] for key in own if key.startswith(inside)}
            layer.make_room(name, tensors)
    if "base.weight" in own:
        layer.base_weight.original = None


def _write_after_loading(module: nn.Module, _keys: object) -> None:
    layer: Any = module
    layer.rewrite()
