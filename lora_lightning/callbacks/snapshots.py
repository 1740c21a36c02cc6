"""Snapshots of parameters with their optimizer's state, for schedules that copy rank components of an earlier step.

All tensors are full ones, equal on all processes, by the parameter's name and "value" or the name in the state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from lora_lightning.distributed import gather_nested, put
from lora_lightning.optim.state import clear_copies, entry_state

VALUE = "value"
Snapshot = dict[str, dict[str, Tensor]]


def take(params: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer]) -> Snapshot:
    """Copies of the parameters' values and of what the optimizers keep for each entry; all processes take part.

    Raises:
        SettingsError: an optimizer keeps a tensor of another shape than its parameter's.
    """
    found: Snapshot = gather_nested({name: _tensors(parameter, optimizers) for name, parameter in params.items()})
    return {name: {key: tensor.clone() for key, tensor in tensors.items()} for name, tensors in found.items()}


def write(params: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer], snapshot: Snapshot) -> None:
    """Write full tensors, equal on all processes, in place; what `snapshot` does not name stays as it is.

    Copies of values that an optimizer keeps for the parameters are forgotten; it takes them anew.
    """
    for name, tensors in snapshot.items():
        live = _tensors(params[name], optimizers)
        for key, tensor in tensors.items():
            put(live[key], tensor)
    for optimizer in optimizers:
        clear_copies(optimizer, [params[name] for name in snapshot])


def _tensors(parameter: nn.Parameter, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    found = {VALUE: parameter.detach()}
    for optimizer in optimizers:
        found |= entry_state(optimizer, parameter)
    return found
