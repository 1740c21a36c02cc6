"""`doctor`: what it prints of the machine, the installation and a config."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from lora_lightning import hookimpl, plugins
from lora_lightning.cli.main import main
from lora_lightning.cli.preflight import machine
from lora_lightning.errors import ModelError
from lora_lightning.models.pretrained import check_weights
from lora_lightning.registry import Component


def test_five_mistakes_show_in_two_runs(sound_config, tmp_path, monkeypatch, capsys):
    """First what keeps the config from being parsed and what is known even so, then the others."""
    monkeypatch.chdir(tmp_path)
    changes = {
        "model.targets": ["query", "valeu"],
        "model.method.init_args.sparsity": 1.2,
        "model.optimzer": "AdamW",
        "data.init_args.train": "nowhere.csv",
        "trainer.max_steps": "many",
    }
    for words in (("optimzer", "nowhere.csv", "many"), ("valeu", "1.2")):
        Path("five.yaml").write_text(yaml.safe_dump(sound_config(changes)))
        assert main(["doctor", "five.yaml"]) == 1
        out = capsys.readouterr().out
        problems = [line for line in out.splitlines() if line.startswith("problem: ")]
        assert len(problems) == len(words), "\n".join(problems)
        assert out.endswith(f"{len(words)} problems found with this machine and this config.\n")
        for text in words:
            assert sum(text in problem for problem in problems) == 1
        changes = {key: value for key, value in changes.items() if key.startswith(("model.targets", "model.method"))}
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert any(row.startswith(f"torch {torch.__version__} ") for row in rows)
    assert any(re.match(r"ll_rose loaded RoseLoRA", row) for row in rows)
    assert any(row.startswith("ddp yes") for row in rows)
    assert any(row.startswith("nf4 on cpu ") for row in rows)


def test_the_machine_alone(capsys, monkeypatch):
    monkeypatch.setattr(machine, "strategies", lambda: {"ddp": "", "other": "no reason"})
    monkeypatch.setattr(machine, "versions", lambda: [machine.Version("one", "1.0", ">=2")])
    assert main(["doctor", "-p", "no:ll_rose"]) == 1
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "ll_rose blocked -" in rows
    assert "other no no reason" in rows
    assert rows[-2:] == ["problem: one is 1.0; needed: >=2.", "1 problem found with this machine."]


def test_a_plugin_that_fails_is_a_problem(capsys, monkeypatch):
    """When it is loaded, or when it is asked for what needs torch."""

    class Later:
        @hookimpl
        def lora_lightning_base_layers(self):
            raise ImportError("no layer")

    broken = plugins.load()
    monkeypatch.setitem(broken.components, "Late", Component("Late", "optimizer", "no_such_module:Late", "ll_late"))
    broken.manager.register(Later(), name="ll_later")
    broken.failed["ll_broken"] = ImportError("no such thing")
    monkeypatch.setattr(plugins, "load", lambda blocked=(): broken)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem: plugin ll_broken failed: ImportError: no such thing\n" in out
    assert "problem: plugin ll_late failed: ModuleNotFoundError: No module named 'no_such_module'\n" in out
    assert "problem: plugin ll_later failed: ImportError: no layer\n" in out


def test_weights_that_are_missing(model_folder, tmp_path):
    check_weights(str(model_folder))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds no model\.safetensors\.$"):
        check_weights(str(model))
    (model / "pytorch_model.bin").write_text("")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which is never opened"):
        check_weights(str(model))
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (model / "one.safetensors").write_text("")
    with pytest.raises(ModelError, match=r"1 of its 2 files of weights are missing, such as two\.safetensors"):
        check_weights(str(model))
    index.write_text("[]")
    with pytest.raises(ModelError, match=r"index\.json cannot be read"):
        check_weights(str(model))
