"""Code that comes with a model is never run, and nobody is asked whether it should be."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.cli.main import main
from lora_lightning.data.images import load_image_processor
from lora_lightning.data.tokens.tokenizers import load_tokenizer
from lora_lightning.errors import DataError, LoraLightningError, ModelError
from lora_lightning.exporters.companions import companion_files
from lora_lightning.models.loading import checkpoint_format, load_model, load_skeleton
from lora_lightning.models.tasks import find_task
from lora_lightning.testing import tiny_decoder

TASK = find_task("causal-lm")


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose configuration, tokenizer and processor are made by a file that leaves a trace when it is run."""

    def asked(*_: Any) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", asked)
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\n")
    automatic = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoModel": "mine.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": automatic}))
    tokenizer = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["mine.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    processor = {"image_processor_type": "I", "auto_map": {"AutoImageProcessor": "mine.I", "AutoProcessor": "mine.P"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize(
    ("read", "error", "message"),
    [
        (lambda folder: load_model(folder, TASK), ModelError, r"brings code of its own, .*with trust_remote_code=True"),
        (lambda folder: load_skeleton(folder, TASK), ModelError, "brings code of its own, and such code is not run"),
        (load_tokenizer, DataError, "brings code of its own, and such code is not run"),
        (lambda folder: load_image_processor(folder, None), DataError, "no image processor can be read there"),
    ],
)
def test_it_is_refused(
    read: Callable[[str], Any], error: type[LoraLightningError], message: str, foreign: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        read(str(foreign))
    assert not (tmp_path / "ran").exists()


def test_what_only_looks_does_without(foreign: Path, tmp_path: Path) -> None:
    assert checkpoint_format(str(foreign)) is None
    model = tiny_decoder()
    model.config._name_or_path = str(foreign)
    assert companion_files(model, None, {}) == {}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("verb", ["doctor", "estimate"])
def test_verbs_do_not_run_it(
    verb: str, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,completion\na,b\n")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model:\n  pretrained: {foreign}\n  task: causal-lm\n  method: LoRA\ndata:\n  class_path: Completions\n"
        f"  init_args:\n    train: {rows}\n"
    )
    assert main([verb, str(config)]) != 0
    assert "trust_remote_code=True" in "".join(capsys.readouterr())
    assert not (tmp_path / "ran").exists()


def test_a_merged_folder_and_an_adapter_folder_of_a_stranger(foreign: Path, tmp_path: Path) -> None:
    """transformers has the class; the folder's own code would stand in for it."""
    tiny_decoder().save_pretrained(foreign)
    config = json.loads((foreign / "config.json").read_text())
    automatic = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    (foreign / "config.json").write_text(json.dumps({**config, "auto_map": automatic}))
    model: Any = load_model(str(foreign), TASK)
    assert type(model) is transformers.LlamaForCausalLM
    ll.inject(model, LoRA(rank=2))
    ll.save_adapter(model, tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), "--format", "merged", "--output", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "ran").exists()
