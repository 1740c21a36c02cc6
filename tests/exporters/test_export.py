"""Exports as a whole: formats, refusals, our description, what is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from exported_models import adapted, llama

import lora_lightning as ll
from lora_lightning.errors import AdapterStateError, ExportError


def test_our_description_lies_beside(tmp_path: Path) -> None:
    ll.export(adapted(), tmp_path / "out")
    side = json.loads((tmp_path / "out" / "lora_lightning.json").read_text())
    assert side["method"] == "LoRA"
    assert side["export"]["class"] == "native"
    assert side["export"]["model"] == "LlamaForCausalLM"


def test_unknown_format_rank_and_name(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ExportError, match=r'format is "mergd"\. Did you mean "merged"'):
        ll.export(model, tmp_path, format="mergd")
    for options in ({"rank": 0}, {"rank": 4, "format": "merged"}):
        with pytest.raises(ExportError, match="it must be at least 1, for a format that takes it"):
            ll.export(model, tmp_path, **options)
    with pytest.raises(AdapterStateError, match=r'no adapter "defualt"\. Did you mean "default"'):
        ll.export(model, tmp_path, name="defualt")
    with pytest.raises(AdapterStateError, match="has no adapters"):
        ll.export(llama(), tmp_path)


@pytest.mark.slow
def test_nothing_here_needs_peft_or_lightning() -> None:
    code = (
        "import sys, lora_lightning.exporters.export\n"
        "assert not {'peft', 'lightning', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
