"""One base, several adapters: who speaks, merged or not, and what cannot be loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lora_lightning as ll
from ll_lora import LoRA
from ll_riemannian_moe import MoELoRA
from lora_lightning.cli.answers.voices import Voices, is_base
from lora_lightning.errors import ModelError, SettingsError

IDS = torch.tensor([[5, 9, 12]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS.to(model.device)).logits.cpu()
    return found


def reference(base: Path, adapter: Path | None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        ll.load_adapter(model, adapter)
    return logits(model)


def test_voices_take_turns_and_compute_what_each_adapter_does(base: Path, adapters: list[Path]) -> None:
    voices = Voices([str(one) for one in adapters], device="cpu")
    assert list(voices.voices) == ["base", "one", "two"]
    assert voices.current.label == "one"
    for merges in (False, True):
        voices.merges = merges
        for name, adapter in (("two", adapters[1]), ("base", None), ("1", adapters[0]), ("base", None)):
            voices.use(name)
            assert torch.allclose(logits(voices.model), reference(base, adapter), atol=0 if not merges else 1e-5)
    with pytest.raises(SettingsError, match=r'there is no adapter "tow". Did you mean "two"\? Loaded: base, one, two'):
        voices.find("tow")


def test_what_is_faster_is_measured_and_said(adapters: list[Path]) -> None:
    voices = Voices([str(adapters[0])], device="cpu")
    said = voices.choose()
    assert said.startswith("merged: " if voices.merges else "unmerged: ")
    assert said.endswith("unmerged, measured just now")
    assert voices.current.label == "one"


def test_half_precision_and_routed_updates_are_not_merged(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    voices = Voices([str(adapters[0])], dtype="bfloat16", device="cpu")
    assert voices.choose() == "unmerged: a small update would be lost in half precision"
    model = AutoModelForCausalLM.from_pretrained(base)
    ll.inject(model, MoELoRA(rank=2, experts=2, top_k=2))
    voices = Voices([str(ll.save_adapter(model, tmp_path / "routed"))], device="cpu")
    assert voices.merge_all().startswith("unmerged: ")
    assert not voices.merges


def test_an_adapter_of_peft_beside_one_of_ours(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    ll.load_adapter(model, adapters[0])
    ll.export(model, tmp_path / "peft", verify=False)
    voices = Voices([str(tmp_path / "peft"), str(adapters[1])], device="cpu")
    voices.use("peft")
    assert torch.allclose(logits(voices.model), reference(base, adapters[0]), atol=1e-5)
    alone = Voices([str(tmp_path / "peft")], device="cpu")
    assert torch.equal(logits(alone.model), logits(voices.model))


def test_a_stack_speaks_with_what_lies_below(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    from lora_lightning.training.module import AdapterModule

    module = AdapterModule(str(base), LoRA(rank=1), task="causal-lm", adapter=[str(adapters[0])])
    module.configure_model()
    with torch.no_grad():
        for adapter in module.adapters().values():
            adapter.lora_B.normal_()
    folder = ll.save_adapter(module, tmp_path / "top")
    voices = Voices([str(folder), str(adapters[0])], device="cpu")
    expected = logits(module.model.eval())
    assert torch.equal(logits(voices.model), expected)
    voices.use("one")
    assert torch.equal(logits(voices.model), reference(base, adapters[0]))
    voices.use("top")
    assert torch.equal(logits(voices.model), expected)


def test_the_bare_base_speaks(base: Path) -> None:
    assert is_base(str(base))
    voices = Voices([str(base)], device="cpu")
    assert list(voices.voices) == ["base"]
    assert torch.equal(logits(voices.model), reference(base, None))


def test_equal_names_are_told_apart_by_the_folders_above(adapters: list[Path], tmp_path: Path) -> None:
    for run in ("a", "b"):
        shutil.copytree(adapters[0], tmp_path / run / "001" / "adapter")
    voices = Voices([str(tmp_path / "a" / "001"), str(tmp_path / "b" / "001")], device="cpu")
    assert list(voices.voices) == ["base", "a/001", "b/001"]


def test_what_cannot_speak(base: Path, plain_base: Path, adapters: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="are base models; one at a time answers"):
        Voices([str(base), str(plain_base)])
    with pytest.raises(SettingsError, match=r'--dtype is "float23". Did you mean "float32"'):
        Voices([str(base)], dtype="float23")
    with pytest.raises(ModelError, match=r'the model or adapter is "./nothing/here"; no such folder'):
        Voices(["./nothing/here"])
    other = AutoModelForCausalLM.from_pretrained(plain_base)
    ll.inject(other, LoRA(rank=1))
    folder = ll.save_adapter(other, tmp_path / "other")
    with pytest.raises(ModelError, match="the adapters were trained on several base models: "):
        Voices([str(adapters[0]), str(folder)])


def test_a_classifier_writes_no_texts(tmp_path: Path) -> None:
    from toy_runs import encoder_folder
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(encoder_folder(tmp_path / "encoder"))
    ll.inject(model, LoRA(rank=1))
    with pytest.raises(ModelError, match=r"BertForSequenceClassification writes no texts; predict --run RUN"):
        Voices([str(ll.save_adapter(model, tmp_path / "adapter"))])
