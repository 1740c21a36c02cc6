from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import LoRA, adapted, bert, llama, logits
from huggingface_hub import ModelCard

import lora_lightning as ll
from lora_lightning.exporters.cards import run_summary
from lora_lightning.exporters.report import Origin


def code_of(folder: Path) -> list[str]:
    return [part.split("```")[0] for part in (folder / "README.md").read_text().split("```python\n")[1:]]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # transformers 5.23 asks itself
@pytest.mark.parametrize("build", [llama, lambda: bert(num_labels=3)], ids=["no head", "a head"])
def test_each_way_to_load_computes_the_same(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    plain = build()
    plain.save_pretrained(tmp_path / "base")
    model = adapted(type(plain).from_pretrained(tmp_path / "base"), LoRA(rank=2)).eval()
    expected = logits(model)
    for form in ("peft", "merged"):
        ll.export(model, tmp_path / form, form)
        ways = code_of(tmp_path / form)
        assert len(ways) == (3 if build is llama else 2) if form == "peft" else 1
        monkeypatch.chdir(tmp_path / form)
        for code in ways:
            names: dict[str, Any] = {}
            exec(code.replace('from_pretrained("base"', 'from_pretrained("../base"'), names)
            torch.testing.assert_close(logits(names["model"].eval()), expected, atol=1e-5, rtol=1e-5)


def test_the_metadata_name_peft_and_the_base(tmp_path: Path) -> None:
    model = adapted()
    model.config._name_or_path = "owner/llama"
    ll.export(model, tmp_path / "out", verify=False)
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "owner/llama", "text-generation")
    side = json.loads((tmp_path / "out" / "lora_lightning.json").read_text())
    assert "README.md" in side["export"]["files"]


def test_an_edited_card_outlives_the_next_export(tmp_path: Path) -> None:
    model = adapted()
    ll.export(model, tmp_path / "out", verify=False)
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    ll.export(model, tmp_path / "out", "merged", verify=False)
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"


def test_the_summary_of_the_run_around_an_adapter(tmp_path: Path) -> None:
    origin = Origin(tmp_path / "adapter", "base")
    assert run_summary(None) is None
    assert run_summary(origin) is None
    (tmp_path / "summary.json").write_text('{"values": 1}')
    assert run_summary(origin) is None
    summary = {"values": {"loss": 0.5}, "steps": 3, "rate": 0.1, "seed": 0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert run_summary(origin) == summary
