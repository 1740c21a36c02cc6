from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from lora_lightning.adapters.folding_rules import check_cascade
from lora_lightning.errors import SettingsError


@dataclass
class Stages:
    """The settings of stages."""

    share: float = 1.0
    rule: str = "outer_step"
    noise: float = 0.1
    noise_mode: str = "restore"
    stage_epochs: int | None = None
    stage_steps: int | None = 7
    lr: str = "continue"
    rewarm_steps: int = 20


@pytest.mark.parametrize("given", [{}, {"share": 0.1, "noise": 0}, {"stage_steps": None, "stage_epochs": 1}])
def test_what_is_allowed(given: dict[str, Any]) -> None:
    check_cascade(Stages(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stage_steps": 0}, r"Stages.stage_steps is 0; it must be a whole number of at least 1, or null"),
        ({"stage_steps": 2.5}, r"Stages.stage_steps is 2.5; it must be a whole number"),
        ({"stage_steps": 1}, r"Stages.stage_steps is 1; it must be at least 2"),
        ({"stage_epochs": 1}, r"stage_epochs is 1 too; give one of them"),
        ({"share": 0.0}, r"Stages.share is 0.0; it must lie in \(0, 1\]"),
        ({"noise": -0.1}, r"Stages.noise is -0.1; it must be at least 0"),
        ({"rewarm_steps": 0}, r"Stages.rewarm_steps is 0; it must be at least 1"),
        ({"rule": "sum"}, r"Stages.rule is 'sum'; it must be \"outer_step\" or \"figure_ema\""),
        ({"noise_mode": "keep"}, r"Stages.noise_mode is 'keep'; it must be \"restore\" or \"persist\""),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_cascade(Stages(**given))
