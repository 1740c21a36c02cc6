"""Clipping of gradients: groups with a norm of their own, and the rest together."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from lora_lightning.errors import SettingsError


def clip_groups(optimizer: Optimizer) -> list[nn.Parameter]:
    """Clip the gradients of every group that has a norm of its own; the parameters of the others."""
    shared: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        if group.get("clip") is None:
            shared += group["params"]
        else:
            nn.utils.clip_grad_norm_(group["params"], group["clip"])
    return shared


def clip_gradients(optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
    """Clip groups with a norm of their own, and the rest together by `value`.

    Args:
        optimizer: holds the groups.
        value: the trainer's `gradient_clip_val`; None or 0 clips only groups of their own.
        algorithm: "value" bounds each entry, anything else the norm.

    Raises:
        SettingsError: a value where the optimizer says `clips_itself`.
    """
    if value and getattr(optimizer, "clips_itself", False):
        raise SettingsError(
            f"trainer.gradient_clip_val is {value}; {type(optimizer).__name__} clips where its rule allows it, and "
            "clipping before would spoil the rule. Leave it null."
        )
    shared = clip_groups(optimizer)
    if value and algorithm == "value":
        nn.utils.clip_grad_value_(shared, value)
    elif value:
        nn.utils.clip_grad_norm_(shared, value)
