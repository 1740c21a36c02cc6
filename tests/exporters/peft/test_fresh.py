"""peft opens an export in a process of its own; the whole way is in tests/exporters/test_from_folder.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from exported_models import LoRA, adapted, bert
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters import from_folder, trained_adapter
from lora_lightning.exporters import source as sources
from lora_lightning.exporters.peft import fresh
from lora_lightning.exporters.report import Origin


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.chdir(tmp_path)
    bert().save_pretrained("base")
    model = transformers.BertForSequenceClassification.from_pretrained("base").eval()
    adapted(model, LoRA(rank=2))
    ll.save_adapter(model, "adapter")
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("trained")
def test_a_base_that_is_another_in_the_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs between this process and the disk is found: here the base model changes in between."""
    real = trained_adapter.load_stored

    def change_base(model: nn.Module, *rest: object) -> None:
        real(model, *rest)
        other = transformers.BertForSequenceClassification.from_pretrained("base")
        other.bert.embeddings.word_embeddings.weight.data.mul_(torch.linspace(-1, 2, 16))
        other.save_pretrained("base")

    monkeypatch.setattr(trained_adapter, "load_stored", change_base)
    with pytest.raises(ExportError, match=r"in a process of its own computes another model from the export"):
        from_folder.export_folder(Path("adapter"), Path("out"), "peft")
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_process_that_fails_is_no_verdict(trained: nn.Module) -> None:
    ll.export(trained, "out")
    verdict = fresh.verify_afresh(sources.find(trained, "default"), Path("out"), Origin(Path("adapter"), "gone"), False)
    assert not verdict.ran
    assert verdict.by.startswith("the process that was to open it failed: ")
    assert "gone" in verdict.by
