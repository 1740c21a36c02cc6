from __future__ import annotations

from pathlib import Path

import pytest
from peft_models import from_peft, llama


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    from_peft(llama, tmp_path, target_modules=["q_proj", "v_proj"])
    return tmp_path
