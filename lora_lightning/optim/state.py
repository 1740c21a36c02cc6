"""Forgetting what an optimizer knows about some parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer


def clear(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Remove the state of these parameters; their next step is a first step, bias correction included."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def clear_copies(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Remove copies of values that these parameters no longer have; the rest of their state stays.

    An optimizer that keeps any lists them as `copies`, names in a parameter's state, and takes a missing one anew.
    """
    for parameter in parameters:
        for name in getattr(optimizer, "copies", ()):
            optimizer.state.get(parameter, {}).pop(name, None)
