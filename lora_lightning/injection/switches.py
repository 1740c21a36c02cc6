"""Which adapters are applied, and which train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from lora_lightning.adapters.base import linked_modules
from lora_lightning.distributed import reshard
from lora_lightning.errors import AdapterStateError

if TYPE_CHECKING:
    pass
from lora_lightning.injection.records import adapters_named, check_known, injected_root, iter_adapters, records


def set_active(model: nn.Module, names: Sequence[str] | str) -> None:
    """Apply exactly these adapters, in this order; what trains is not changed.

    Raises:
        AdapterStateError: an unknown name or one given twice, adapters that cannot be stacked, or a merged layer. What
            was active stays so.
    """
    wanted = check_known(injected_root(model), [names] if isinstance(names, str) else names)
    layers = [(layer, tuple(n for n in wanted if n in layer.adapters)) for _, layer in iter_adapters(model)]
    reshard(model)
    for layer, here in layers:
        if layer.merged and layer.merged != here:
            raise AdapterStateError(f"{', '.join(layer.merged)} is merged; call unmerge before another set is active.")
        layer.check_active(here)
    for layer, here in layers:
        layer.active = here


def set_trainable(model: nn.Module, names: Sequence[str] | str) -> None:
    """Train exactly these adapters and the base parameters that go with them; freeze everything else.

    Raises:
        AdapterStateError: an unknown name.
    """
    root = injected_root(model)
    wanted = check_known(root, [names] if isinstance(names, str) else names)
    for parameter in root.parameters():
        parameter.requires_grad_(False)
    for name in wanted:
        adapters = adapters_named(root, name).values()
        for module in (*adapters, *linked_modules(adapters)):
            for parameter in module.parameters():
                parameter.requires_grad_(True)
        for parameter_name in records(root)[name].trained:
            root.get_parameter(parameter_name).requires_grad_(True)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """The base model's function inside the `with` block; heads that train in full keep their values.

    Merged adapters are taken out for the time of the block.

    Raises:
        AdapterStateError: a layer was merged with `keep_original=False`.
    """
    reshard(model)
    layers = [layer for _, layer in iter_adapters(model)]
    merged = [layer for layer in layers if layer.merged]
    stuck = [layer for layer in merged if not layer.can_unmerge]
    if stuck:
        raise AdapterStateError("merged with keep_original=False; the base model's function is gone.")
    before = [layer.disabled for layer in layers]
    for layer in merged:
        layer.unmerge()
    for layer in layers:
        layer.disabled = True
    try:
        yield
    finally:
        reshard(model)
        for layer, was in zip(layers, before, strict=True):
            layer.disabled = was
        for layer in merged:
            layer.merge()
