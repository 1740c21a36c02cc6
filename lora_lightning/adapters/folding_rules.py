"""Names of the rules by which stages are folded; imports neither torch nor Lightning."""

from __future__ import annotations

from typing import Literal

Rule = Literal["outer_step", "figure_ema"]
NoiseMode = Literal["restore", "persist"]
