"""What an optimizer knows about some parameters: reading it, and forgetting it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.distributed import full_tensor, local, own_rows
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


def prune(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    fraction: float,
    by: Literal["random", "magnitude"],
    apart: bool,
    generator: Callable[[str], torch.Generator],
) -> None:
    """Put entries of the state of a parameter to zero, in place; counts of steps stay.

    Args:
        optimizer: whose state it is.
        parameter: may be sharded; all processes then take part.
        fraction: of the entries that become zero: each with this probability, or those up to this quantile of |entry|,
            whose ties become zero too.
        by: which.
        apart: whether each tensor of the state has a mask of its own; else all have one, by magnitude that of the last
            tensor, which is the second moment of Adam. Under one mask no entry keeps a first moment without a second.
        generator: of a purpose; gives the numbers of one mask, the same on all processes.
    """
    moments = entry_state(optimizer, parameter)
    names = list(moments)
    for name in names:
        by_name = name if apart else names[-1]
        if apart or name == names[0]:
            keep = _kept(moments[by_name], fraction, by, generator(by_name if apart else "all"))
        local(moments[name]).mul_(own_rows(keep, moments[name]))


def _kept(values: Tensor, fraction: float, by: str, generator: torch.Generator) -> Tensor:
    """Mask of the entries that stay, for the full tensor."""
    if by == "random":
        return (torch.rand(values.shape, generator=generator, device=generator.device) > fraction).to(values.device)
    sizes = full_tensor(values).abs().float()
    return sizes > quantile(sizes.flatten(), fraction)


def quantile(values: Tensor, fraction: float) -> Tensor:
    """The linear quantile of (n,) for any n; torch's own takes at most 16 million entries."""
    at = fraction * (len(values) - 1)
    low = values.kthvalue(math.floor(at) + 1).values
    return torch.lerp(low, values.kthvalue(math.ceil(at) + 1).values, at - math.floor(at))
