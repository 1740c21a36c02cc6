"""What an optimizer knows about some parameters: reading it, and forgetting it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.errors import SettingsError


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


def entry_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer keeps for each entry of a parameter, such as moments, by its name; empty before a first step.

    Single numbers, such as a count of steps, belong to no entry and are left out, as are copies of the values.

    Raises:
        SettingsError: a tensor of another shape, of which no part belongs to an entry.
    """
    found = {}
    for name, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.numel() == 1 or name in getattr(optimizer, "copies", ()):
            continue
        if value.shape != parameter.shape:
            raise SettingsError(
                f'{type(optimizer).__name__} keeps "{name}" of shape {tuple(value.shape)} for a parameter of shape '
                f"{tuple(parameter.shape)}, so its rows cannot go with those of the parameter; take an optimizer with "
                "a number for each entry, such as AdamW."
            )
        found[name] = value
    return found
