from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from exported_models import Folded, LoRA, adapted, bert
from torch import Tensor

import lora_lightning as ll
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import ExportError
from lora_lightning.exporters.peft import folder as peft_file
from lora_lightning.methods import Method


class Careless(Folded):
    """States a low-rank form that is not its own."""

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return torch.ones(1, 16), self.gain.detach()[:, None]

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight + 1.01 * self.gain.detach()[:, None].to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Wrong(Method):
    def build(self, base: BaseLayer) -> Adapter:
        return Careless(base)


def test_the_folder_says_what_is_needed_and_no_more(tmp_path: Path) -> None:
    model = adapted(targets=["q_proj", "v_proj"])
    report = ll.export(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    assert report.files == ("README.md", "adapter_config.json", "adapter_model.safetensors", "lora_lightning.json")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(report.files)
    assert str(report).startswith("peft (native): 4 layers to")
    assert "  verified by peft 0." in str(report)
    assert "not verified" in str(ll.export(model, tmp_path / "out", verify=False))


def test_a_stated_form_that_is_not_the_function_is_found(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"q_proj: the files give an update that differs by .*Nothing was put in place"
    ):
        ll.export(adapted(method=Wrong(), targets=["q_proj"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["factor", "alpha", "head", "layer"])
def test_damage_between_writing_and_reading_is_found(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = peft_file.read

    def damaged(directory: Path, stacks: peft_file.Stacks) -> peft_file.PeftFolder:
        read = real(directory, stacks)
        path = next(iter(read.layers))
        layer = read.layers[path]
        if change == "factor":
            layer.A[0, 0] += 1e-3
        elif change == "alpha":
            read.layers[path] = peft_file.PeftLayer(layer.A, layer.B, None, None, 8.01, layer.scaling * 1.001)
        elif change == "head":
            read.heads["classifier.bias"][0] += 1e-6
        else:
            del read.layers[path]
        return read

    monkeypatch.setattr(peft_file, "read", damaged)
    with pytest.raises(ExportError, match=r"differs by|bit for bit|other layers or heads"):
        ll.export(adapted(bert()), tmp_path / "out")
    ll.export(adapted(bert()), tmp_path / "unchecked", verify=False)


def test_bias_on_embeddings_and_values_that_are_not_finite(tmp_path: Path) -> None:
    model = adapted(method=LoRA(rank=2), targets=["embed_tokens", "q_proj"], overrides={"q_proj": {"bias": True}})
    with pytest.raises(ExportError, match="an embedding cannot have it"):
        ll.export(model, tmp_path / "out")
    model = adapted(targets=["q_proj"])
    next(iter(ll.iter_adapters(model)))[1].adapter("default").lora_A.data[0, 0] = float("nan")
    for format, message in (("peft", "the adapter holds values that are not finite"), ("merged", "not finite")):
        before = [layer.base.weight.clone() for _, layer in ll.iter_adapters(model)]
        with pytest.raises(ExportError, match=message):
            ll.export(model, tmp_path / "out", format=format)
        after = [layer.base.weight for _, layer in ll.iter_adapters(model)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
