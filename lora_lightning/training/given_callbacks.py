"""Callbacks that a module brings, beside those that the trainer was given."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.callbacks import Callback

from lora_lightning.registry import arguments


def yielding(ours: Sequence[Callback], given: Sequence[Callback]) -> list[Callback]:
    """Those of `ours` that no given callback replaces; prints where one does with other settings."""
    for callback in ours:
        _say_difference(callback, given)
    return [callback for callback in ours if not any(isinstance(other, type(callback)) for other in given)]


def _say_difference(callback: Callback, given: Sequence[Callback]) -> None:
    settings = {key: value for key, value in vars(callback).items() if key in arguments(type(callback))}
    for other in given:
        if isinstance(other, type(callback)):
            theirs = {key: getattr(other, key, None) for key in settings}
            changed = ", ".join(f"{key}={theirs[key]!r}" for key in settings if theirs[key] != settings[key])
            if changed:
                print(f"{type(callback).__name__}: the trainer's replaces the method's ({changed})")
