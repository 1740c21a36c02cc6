"""Where modules stand in a model."""

from __future__ import annotations

from torch import nn


def places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (parent, name) under which a module stands, by the module's id."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, name))
    return found
