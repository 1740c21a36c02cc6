from __future__ import annotations

from pathlib import Path

import pytest
from exported_models import adapted, bert

import lora_lightning as ll
from lora_lightning.errors import ExportError


def test_parts_of_modules_cannot_be_heads(tmp_path: Path) -> None:
    model = adapted(bert(), also_train=["classifier.bias"])
    with pytest.raises(ExportError, match=r"classifier\.bias trains in full, but is not a whole module"):
        ll.export(model, tmp_path / "out")
