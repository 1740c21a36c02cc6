"""Models without values: on the meta device until a strategy sends them."""

from __future__ import annotations

from torch import nn

_FOLLOWS = "_lora_lightning_values_follow"


def values_follow(model: nn.Module) -> bool:
    """Whether a model on the meta device will be given its values later, by the process that has read them."""
    return bool(model.__dict__.get(_FOLLOWS))


def is_counted(model: nn.Module) -> bool:
    """Whether all tensors are without data, those that are made beside the model's too: its step is only counted."""
    return values_follow(model) and not any(parameter.is_meta for parameter in model.parameters())


def expect_values(model: nn.Module) -> nn.Module:
    """Mark a model without values as one that will be given them, adapters included; returns it."""
    model.__dict__[_FOLLOWS] = True
    return model
