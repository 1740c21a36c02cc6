from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _tiny(one_thread: None) -> None:
    """All tensors here are tiny."""
