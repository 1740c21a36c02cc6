"""Settings of stages: each rule, and what contradicts another setting."""

from __future__ import annotations

import pytest

from lora_lightning.errors import SettingsError
from lora_lightning.stages import CascadeFields


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"blend_decay": 0.0}, r"blend_decay is 0\.0; it must lie in \(0, 1\]"),
        ({"pruned_fraction": 1.0}, r"pruned_fraction is 1\.0; it must lie in \(0, 1\)"),
        ({"active_layers": 0}, r"active_layers is 0; it must be a whole number of at least 1"),
        ({"log_rank": 0}, r"log_rank is 0; it must be a whole number of at least 1"),
        ({"stage_ranks": []}, r"stage_ranks is \[\]; it must be whole numbers of at least 1, such as \[8, 4\]"),
        ({"lr_floor": 0.1}, r'lr_floor is 0\.1; lr is "continue", which has no floor; take lr: jagged'),
        ({"lr": "jagged", "lr_floor": 1.0}, r"lr_floor is 1\.0; it must lie in \[0, 1\)"),
        ({"rule": "figure_ema", "log_rank": 4}, r'log_rank is 4; rule is "figure_ema", which averages whole updates'),
        ({"remainder": "shrink", "active_layers": 2}, r"remainder is 'shrink'; .* no layer can rest; take restart"),
        ({"remainder": "shrink", "stage_ranks": [2]}, r"remainder is 'shrink'; .* stage_ranks would cut it"),
        ({"remainder": "shrink", "noise": 0.1}, r"remainder is 'shrink'; .* another noise"),
        ({"noise": 0.1, "noise_mode": "persist", "active_layers": 2}, r"active_layers is 2; noise stays on all layers"),
    ],
)
def test_settings_outside_their_rules(options, text):
    with pytest.raises(SettingsError, match=text):
        CascadeFields(**options)
