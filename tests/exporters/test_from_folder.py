from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from exported_models import LoRA, adapted, bert, logits
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError, ExportError
from lora_lightning.exporters.from_folder import export_folder
from lora_lightning.storage.stored import read_folder


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base with two labels in `base`, and an adapter with three in `adapter`; the base's path is relative."""
    monkeypatch.chdir(tmp_path)
    bert(num_labels=2).save_pretrained("base")
    model = transformers.BertForSequenceClassification.from_pretrained(
        "base", num_labels=3, ignore_mismatched_sizes=True
    )
    adapted(model, LoRA(rank=2))
    ll.save_adapter(model, "adapter")
    torch.save(logits(model.eval()), "logits.pt")
    return tmp_path


@pytest.mark.slow
def test_peft_from_an_adapter_folder(trained: Path) -> None:
    assert read_folder("adapter").base == "base"
    text = str(export_folder(Path("adapter"), Path("out"), "peft"))
    assert text.startswith('peft (native): 12 layers to "out"')
    assert "verified by peft 0." in text
    assert "in a process of its own on the base model, outputs alike up to" in text
    model = transformers.BertForSequenceClassification.from_pretrained(
        "base", num_labels=3, ignore_mismatched_sizes=True
    )
    ll.import_peft(model, "out")
    torch.testing.assert_close(logits(model.eval()), torch.load("logits.pt"), atol=1e-6, rtol=1e-5)


def test_merged_from_an_adapter_folder(trained: Path) -> None:
    export_folder(Path("adapter"), Path("out"), "merged")
    model = transformers.AutoModelForSequenceClassification.from_pretrained("out").eval()
    assert model.config.num_labels == 3
    torch.testing.assert_close(logits(model), torch.load("logits.pt"), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_another_path_to_the_base(trained: Path) -> None:
    Path("base").rename("moved")
    with pytest.raises(ExportError, match=r"which cannot be loaded: .* with --pretrained"):
        export_folder(Path("adapter"), Path("out"), "peft")
    export_folder(Path("adapter"), Path("out"), "peft", rank=1, pretrained="./moved")
    with pytest.raises(ExportError, match=r'--pretrained is "\./movd"; no such folder.*Nearest: moved'):
        export_folder(Path("adapter"), Path("out"), "peft", pretrained="./movd")


def test_a_folder_without_a_base_or_of_another_kind(trained: Path) -> None:
    model = adapted(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=2), targets=["0"])
    ll.save_adapter(model, "plain")
    with pytest.raises(ExportError, match="does not say which base model it was trained on; give it with --pretrained"):
        export_folder(Path("plain"), Path("out"), "peft")
    with pytest.raises(ExportError, match="trained inside Sequential, which is no class of transformers"):
        export_folder(Path("plain"), Path("out"), "peft", pretrained="base")
    with pytest.raises(AdapterFileError, match=r"holds no adapter\.safetensors"):
        export_folder(Path("base"), Path("out"), "peft")
    with pytest.raises(ExportError, match="format is"):
        export_folder(Path("adapter"), Path("out"), "onnx")
