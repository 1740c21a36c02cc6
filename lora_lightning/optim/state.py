"""Forgetting what an optimizer knows about some parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer


def clear(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Remove the state of these parameters; their next step is a first step, bias correction included."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
