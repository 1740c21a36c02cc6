"""Which adapters are applied, and which train."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import cast

from torch import nn

from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.base import Adapter, linked_modules
from lora_lightning.adapters.base_weight import AFTER_FINAL_MERGE
from lora_lightning.distributed import reshard
from lora_lightning.errors import AdapterStateError
from lora_lightning.injection.heads import heads_of, show_heads, trainable_heads
from lora_lightning.injection.records import (
    adapters_named,
    check_known,
    injected_root,
    iter_adapters,
    meant_to_train,
    note_trained,
    records,
)


def set_active(model: nn.Module, names: Sequence[str] | str) -> None:
    """Apply exactly these adapters, in this order; what trains is not changed.

    Raises:
        AdapterStateError: an unknown name or one given twice, adapters that cannot be stacked, or a merged layer. What
            was active stays so.
    """
    wanted = check_known(injected_root(model), [names] if isinstance(names, str) else names)
    layers = [layer for _, layer in iter_adapters(model)]
    reshard(model)
    activate(layers, wanted)
    show_heads(injected_root(model), wanted)


def activate(layers: Iterable[AdaptedLayer], names: Sequence[str]) -> None:
    """As `set_active`, for layers that are known already; every name must be."""
    wanted = [(layer, tuple(name for name in names if name in layer.adapters)) for layer in layers]
    for layer, here in wanted:
        if layer.merged and layer.merged != here:
            raise AdapterStateError(f"{', '.join(layer.merged)} is merged; {layer.merging.way_out}")
        layer.check_active(here)
    for layer, here in wanted:
        layer.active = here


def set_trainable(model: nn.Module, names: Sequence[str] | str) -> None:
    """Train exactly these adapters and the base parameters that go with them; freeze everything else.

    An adapter's head trains while the adapter is active.

    Raises:
        AdapterStateError: an unknown name, or two adapters that have the same head.
    """
    root = injected_root(model)
    wanted = check_known(root, [names] if isinstance(names, str) else names)
    _check_one_head(root, wanted)
    freeze(root.parameters())
    train_only(root, [layer for _, layer in iter_adapters(root)], wanted)


def _check_one_head(root: nn.Module, names: Sequence[str]) -> None:
    owner: dict[str, str] = {}
    for name in names:
        for parameter in records(root)[name].trained:
            if parameter in owner:
                raise AdapterStateError(
                    f'adapters "{owner[parameter]}" and "{name}" have a {parameter} each, which the model has once: '
                    "train one of them at a time."
                )
            owner[parameter] = name


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Let none of them train."""
    for parameter in parameters:
        parameter.requires_grad_(False)


def _own_parameters(adapter: Adapter) -> Iterator[nn.Parameter]:
    """Those of an adapter and of what it shares with others."""
    for module in (adapter, *linked_modules([adapter])):
        yield from module.parameters()


def meant_parameters(root: nn.Module) -> list[list[nn.Parameter]]:
    """What `inject` or `set_trainable` has let train, though it may be frozen since: of each adapter, and of heads."""
    found: list[list[nn.Parameter]] = []
    for name in meant_to_train(root):
        adapters = [list(_own_parameters(adapter)) for adapter in adapters_named(root, name).values()]
        found += [own for own in adapters if own]
        found += [[parameter] for parameter in trainable_heads(root, name)]
    return found


def train_only(root: nn.Module, layers: Collection[AdaptedLayer], names: Sequence[str]) -> None:
    """Of these layers' adapters train exactly those of these names, and what goes with them.

    That is what they share with other layers, and the base parameters that their records name.
    """
    note_trained(root, names)
    for layer in layers:
        for adapter in layer.adapters.values():
            freeze(_own_parameters(cast(Adapter, adapter)))
    for name in names:
        for layer in layers:
            if name in layer.adapters:
                for parameter in _own_parameters(layer.adapter(name)):
                    parameter.requires_grad_(True)
    for name in records(root):
        for parameter in trainable_heads(root, name):
            parameter.requires_grad_(name in names)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """The base model's function inside the `with` block, with its own heads.

    Merged adapters are taken out for the time of the block.

    Raises:
        AdapterStateError: a layer was merged with `keep_original=False`.
    """
    reshard(model)
    layers = [layer for _, layer in iter_adapters(model)]
    merged = [layer for layer in layers if layer.merged]
    stuck = [layer for layer in merged if not layer.can_unmerge]
    if stuck:
        raise AdapterStateError(
            f"merged with keep_original=False; the base model's function is gone. {AFTER_FINAL_MERGE}"
        )
    before = [layer.disabled for layer in layers]
    for layer in merged:
        layer.unmerge()
    for layer in layers:
        layer.disabled = True
    try:
        with heads_of(injected_root(model), []) if layers else nullcontext():
            yield
    finally:
        reshard(model)
        for layer, was in zip(layers, before, strict=True):
            layer.disabled = was
        for layer in merged:
            layer.merge()
