from __future__ import annotations

from pathlib import Path

import pytest
from adapter_files import adapted

import lora_lightning as ll


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of a TinyMLP."""
    return ll.save_adapter(adapted(), tmp_path / "adapter")
