from __future__ import annotations

import comparisons
import pytest

from lora_lightning.cli.compare.outcomes import outcomes


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A comparison of three arms, with tuning and three seeds: its folder, plan and outcomes; it is only read."""
    folder = tmp_path_factory.mktemp("comparison") / "001"
    plan = comparisons.ended(folder, also=("--config", "other"))
    return folder, plan, outcomes(folder, plan)
