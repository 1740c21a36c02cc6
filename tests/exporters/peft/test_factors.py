from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from exported_models import Folded, Gain, adapted, llama
from safetensors.torch import load_file

import lora_lightning as ll
from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.errors import ExportError
from lora_lightning.exporters.peft import folder as peft_file
from lora_lightning.methods import Method


@dataclass(frozen=True, kw_only=True)
class Outer(Method):
    def build(self, base: BaseLayer) -> Adapter:
        return Folded(base)


def test_a_folded_update_gets_scaling_one(tmp_path: Path) -> None:
    model = adapted(method=Outer(), targets=["q_proj"])
    report = ll.export(model, tmp_path / "out")
    assert report.kind == "exact LoRA"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (1, 1)


def test_half_precision_bases_keep_full_precision_factors(tmp_path: Path) -> None:
    model = adapted(llama().to(torch.bfloat16))
    report = ll.export(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert report.difference is not None
    assert report.difference < 1e-6


def test_truncation_states_what_it_leaves_out(tmp_path: Path) -> None:
    model = adapted(method=Gain(), targets=["q_proj"])
    report = ll.export(model, tmp_path / "out", rank=3)
    path = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(path)
    delta = layer.adapter("default").merged_weight(layer.base.weight).detach() - layer.base.weight
    singular = torch.linalg.svdvals(delta).square()
    assert report.discarded[path] == pytest.approx(float(singular[3:].sum() / singular.sum()), rel=1e-4)
    written = peft_file.read(tmp_path / "out", {}).layers[path].delta().float()
    lost = (written - delta).square().sum() / delta.square().sum()
    assert float(lost) == pytest.approx(report.discarded[path], rel=1e-4)
    assert report.kind == "truncated SVD"
    assert "truncated: 2 layers lose part of their update, most model.layers" in str(report)


def test_a_rank_that_suffices_truncates_nothing(tmp_path: Path) -> None:
    report = ll.export(adapted(), tmp_path / "out", rank=4)
    assert report.kind == "native"
    assert not report.discarded
    report = ll.export(adapted(), tmp_path / "out", rank=2)
    assert len(report.discarded) == 14
    report = ll.export(adapted(method=Gain(), targets=["q_proj"]), tmp_path / "out", rank=99)
    assert not report.discarded or max(report.discarded.values()) < 1e-12


def test_no_low_rank_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r'Gain on .* has no exact low-rank form: its export class is "merged only"\. Give rank=N'
    ):
        ll.export(adapted(method=Gain(), targets=["q_proj"]), tmp_path / "out")
