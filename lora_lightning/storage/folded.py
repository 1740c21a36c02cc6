"""Folded updates in files and checkpoints: they have no shape before their tensors are seen."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lora_lightning.errors import AdapterStateError, ResumeError
from lora_lightning.injection.records import iter_adapters


def folded_tensors(state: Mapping[str, Tensor], name: str) -> dict[str, dict[str, Tensor]]:
    """Tensors of one adapter's folded updates by layer path and their own names."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        path, inside, tensor = key.rpartition(f".shifts.{name}.")
        if inside:
            found.setdefault(path, {})[tensor] = value
    return found


def make_room_for_folded(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Give each layer an empty folded update of the shape in `state`, or none, so that `state` can be loaded.

    Raises:
        ResumeError: tensors that fit no folded update of their layer.
    """
    tensors = folded_tensors(state, name)
    for path, layer in iter_adapters(model):
        if name not in layer.adapters:
            continue
        try:
            layer.make_room(name, tensors.get(path, {}))
        except AdapterStateError as error:
            raise ResumeError(f"the checkpoint's adapter does not fit {path}: {error}") from error


def rewrite_weights(model: nn.Module) -> None:
    """Write the base weights as folded updates say; to be called when the tensors of a checkpoint have been loaded."""
    for _, layer in iter_adapters(model):
        layer.rewrite()
