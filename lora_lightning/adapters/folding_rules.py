"""Rules of the settings of stages, shared by the callback and by methods; imports neither torch nor Lightning."""

from __future__ import annotations

from typing import Any, Literal, get_args

from lora_lightning.errors import check

Rule = Literal["outer_step", "figure_ema"]
NoiseMode = Literal["restore", "persist"]
StageRate = Literal["continue", "rewarm", "restart"]
Moments = Literal["reset", "keep"]
_CHOICES = {"rule": Rule, "noise_mode": NoiseMode, "lr": StageRate, "moments": Moments}


def check_cascade(owner: Any) -> None:
    """Raise `SettingsError` for a setting of stages outside its rule; `owner` has fields of `callbacks.Cascade`."""
    for field in ("stage_epochs", "stage_steps"):
        value = getattr(owner, field)
        whole = value is None or (type(value) is int and value >= 1)
        check(whole, owner, field, "it must be a whole number of at least 1, or null.")
    both = owner.stage_epochs is not None and owner.stage_steps is not None
    check(not both, owner, "stage_steps", f"stage_epochs is {owner.stage_epochs} too; give one of them.")
    check(owner.stage_steps != 1, owner, "stage_steps", "it must be at least 2: a stage's first step moves one factor.")
    check(0 < owner.share <= 1, owner, "share", "it must lie in (0, 1]. Weight of the newest update; 0.5 is usual.")
    check(owner.noise >= 0, owner, "noise", "it must be at least 0. Relative to the weight's deviation; 0.1 is usual.")
    check(owner.rewarm_steps >= 1, owner, "rewarm_steps", "it must be at least 1; 20 to 50 are common.")
    for field, choices in _CHOICES.items():
        listed = " or ".join(f'"{choice}"' for choice in get_args(choices))
        value = getattr(owner, field, get_args(choices)[0])
        check(value in get_args(choices), owner, field, f"it must be {listed}.")
