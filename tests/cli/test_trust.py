"""A run folder from a stranger: what --run takes of its config, what it leaves out, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lora_lightning import plugins
from lora_lightning.cli.command_line import read
from lora_lightning.cli.main import main
from lora_lightning.cli.trust import trusted_config
from lora_lightning.errors import RunFolderError

SOUND = {
    "seed_everything": 1,
    "model": {
        "pretrained": "model",
        "method": {"class_path": "ll_lora.LoRA", "init_args": {"rank": 2}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
    },
    "data": {"class_path": "lora_lightning.data.Chat", "init_args": {"train": "a.jsonl"}},
    "trainer": {
        "max_steps": 3,
        "precision": "32-true",
        "default_root_dir": "./here",
        "callbacks": None,
        "logger": True,
    },
}


@pytest.fixture
def config(tmp_path):
    def write(changes):
        settings = yaml.safe_load(yaml.safe_dump(SOUND))
        for key, value in changes.items():
            *parents, last = key.split(".")
            node = settings
            for parent in parents:
                node = node[parent]
            node[last] = value
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        return str(tmp_path / "config.yaml")

    return write


def test_a_config_of_core_and_plugins_is_taken_as_it_is(config):
    assert trusted_config(config({})) == config({})


OBJECTS = {
    "trainer.callbacks": [{"class_path": "evil.Callback"}, "EarlyStopping"],
    "trainer.logger": {"class_path": "evil.Logger"},
    "trainer.plugins": ["evil.Plugin"],
    "trainer.profiler": "advanced",
    "trainer.strategy": "evil.Strategy",
    "trainer.accelerator": {"class_path": "evil.Accelerator"},
    "optimizer": {"class_path": "evil.Optimizer"},
}


@pytest.mark.parametrize("key", OBJECTS)
def test_what_can_do_more_than_compute_is_left_out_and_said(config, capsys, key):
    kept = yaml.safe_load(trusted_config(config({key: OBJECTS[key]})))
    assert "evil" not in str(kept)
    assert kept["model"] == SOUND["model"]
    assert kept["trainer"]["max_steps"] == 3
    assert kept["trainer"]["default_root_dir"] == "./here"
    assert f"{key} left out; --trust-run takes all of it" in capsys.readouterr().out


def test_what_is_null_is_not_said_to_be_left_out(config, capsys):
    nothing = {"serve_with": None, "ckpt_path": None, "weights_only": None}
    assert trusted_config(config(nothing)) == config(nothing)
    assert capsys.readouterr().out == ""
    kept = yaml.safe_load(trusted_config(config({**nothing, "serve_with": "vllm", "ckpt_path": "a.ckpt"})))
    assert kept["serve_with"] == "vllm"
    assert "ckpt_path" not in kept
    assert "config.yaml: ckpt_path left out; --trust-run takes all of it\n" in capsys.readouterr().out


CLASSES = {
    "model.method": "evil.Method",
    "model.method.class_path": "evil.Method",
    "model.method.init_args": {"inner": {"class_path": "os.system"}},
    "model.optimizer.class_path": "evil.Optimizer",
    "model.lr_scheduler": {"class_path": "ll_lora_evil.Schedule"},
    "data.class_path": "builtins.eval",
    "data.init_args": {"x": [{"class_path": "evil:Data"}]},
}


@pytest.mark.parametrize("key", CLASSES)
def test_a_class_of_any_other_package_is_refused(config, key):
    with pytest.raises(RunFolderError, match=r"neither of lora_lightning nor of an installed plugin.*Give --trust-run"):
        trusted_config(config({key: CLASSES[key]}))


def test_the_flag_goes_with_a_run(config_folder):
    assert not read(["predict", "--run", "runs/rose/001"]).trusted
    assert read(["predict", "--trust-run", "--run", "runs/rose/001"]).trusted
    assert read(["fit", "--resume", "runs/rose/001"]).trusted
    with pytest.raises(RunFolderError, match="--trust-run goes with --run DIR"):
        read(["fit", "--config", "mine.yaml", "--trust-run"])


def test_no_code_of_the_folder_runs(config_folder, monkeypatch, capsys):
    """A module beside the run, and one in the current folder, are not imported."""
    Path("evil.py").write_text("open('ran', 'w').close()\nclass Method: pass\n")
    monkeypatch.syspath_prepend(str(config_folder))
    settings = {"model": {"pretrained": "x", "method": {"class_path": "evil.Method"}}}
    Path("runs/rose/001/config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["predict", "--run", "runs/rose/001"]) == 2
    assert "model.method is evil.Method" in capsys.readouterr().err
    assert not Path("ran").exists()


def test_plugins_of_the_current_folder_are_not_searched(tmp_path, monkeypatch):
    """As `python -m` has it in front of its path; one that PYTHONPATH names is meant."""
    info = tmp_path / "evil-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lora_lightning]\nevil = evil\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "evil" in {entry.name for entry in plugins.entries()}
    monkeypatch.chdir(tmp_path)
    assert "evil" not in {entry.name for entry in plugins.entries()}
    assert {"ll_lora", "ll_rose"} <= {entry.name for entry in plugins.entries()}
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "evil" in {entry.name for entry in plugins.entries()}
