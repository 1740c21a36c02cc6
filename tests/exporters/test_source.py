from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from exported_models import Gain, LoRA, adapted, assert_untouched, bert, llama, logits, randomise, state_of
from safetensors.torch import load_file
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ExportError
from lora_lightning.exporters.export import FORMATS


@dataclass(frozen=True, kw_only=True)
class Routed(Gain):
    mergeable: ClassVar[bool] = False
    export: ClassVar[str] = "not expressible"


def test_one_of_several_adapters_merged_or_not(tmp_path: Path) -> None:
    model = adapted(targets=["q_proj"], name="first")
    ll.inject(model, LoRA(rank=2), targets=["v_proj"], name="second")
    ll.merge(model)
    before = state_of(model)
    report = ll.export(model, tmp_path / "out", name="first")
    assert report.layers == 2
    assert_untouched(model, before)
    assert all(layer.merged == layer.active for _, layer in ll.iter_adapters(model))


def test_names_are_relative_to_the_hugging_face_model(tmp_path: Path) -> None:
    wrapper = nn.ModuleDict({"inner": bert()})
    ll.inject(wrapper, LoRA(rank=2))
    randomise(wrapper)
    ll.export(wrapper, tmp_path / "out")
    plain = bert()
    ll.import_peft(plain, tmp_path / "out")
    assert torch.equal(logits(plain.eval()), logits(wrapper["inner"].eval()))


def test_with_a_head_outside_names_are_relative_to_the_whole(tmp_path: Path) -> None:
    wrapper = nn.ModuleDict({"inner": llama(), "score": nn.Linear(40, 2)})
    ll.inject(wrapper, LoRA(rank=2), targets=["q_proj"], also_train=["score"])
    randomise(wrapper)
    ll.export(wrapper, tmp_path / "out")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in keys
    assert "base_model.model.inner.model.layers.0.self_attn.q_proj.lora_A.weight" in keys


@pytest.mark.parametrize("format", FORMATS)
def test_an_input_routed_method_is_refused(format: str, tmp_path: Path) -> None:
    model = adapted(method=Routed(), targets=["q_proj"])
    with pytest.raises(
        ExportError, match=r'Routed on .*q_proj depends on its input: its export class is "not expressible"'
    ):
        ll.export(model, tmp_path / "out", format=format)


def test_a_model_merged_for_good_is_refused(tmp_path: Path) -> None:
    model = adapted()
    ll.merge(model, keep_original=False)
    with pytest.raises(ExportError, match="merged with keep_original=False, so its base is gone"):
        ll.export(model, tmp_path / "out")
