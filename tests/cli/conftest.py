"""A tiny config, and the config check; folders with configs and runs, empty but for their names."""

from __future__ import annotations

import copy
from pathlib import Path

import comparisons
import pytest
import yaml
from toy_runs import encoder_folder, labelled_file

from lora_lightning import plugins
from lora_lightning.cli import configs
from lora_lightning.cli.compare.outcomes import outcomes


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny model, with data beside it."""
    path = encoder_folder(tmp_path_factory.mktemp("checked") / "model")
    labelled_file(path / "train.csv", rows=40)
    return path


@pytest.fixture
def sound_config(model_folder):
    """A function that gives a sound config with some values changed."""
    sound = {
        "model": {
            "pretrained": str(model_folder),
            "method": {"class_path": "RoseLoRA", "init_args": {"rank": 2, "sparsity": 0.5}},
            "targets": ["query", "value"],
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-2}},
        },
        "data": {"class_path": "LabelledText", "init_args": {"train": f"{model_folder}/train.csv", "batch_size": 4}},
        "trainer": {"max_steps": 8, "max_epochs": -1, "accelerator": "cpu"},
    }

    def change(changes):
        changed = copy.deepcopy(sound)
        for key, value in changes.items():
            node = changed
            *parents, last = key.split(".")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return changed

    return change


@pytest.fixture
def checked(sound_config, tmp_path, monkeypatch):
    """A function that writes a sound config with some values changed, and says what `check_config` finds in it."""
    from lora_lightning.cli.preflight.config import check_config

    monkeypatch.chdir(tmp_path)
    plugins.load()

    def check(changes, *flags):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(sound_config(changes)))
        return check_config(["--config", str(path), *flags])

    return check


@pytest.fixture
def config_folder(tmp_path, monkeypatch):
    """A working folder with two configs, a finished run (001) and an empty one (002)."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "other.yaml"):
        Path(name).touch()
    for number in ("001", "002"):
        Path("runs/rose", number).mkdir(parents=True)
    for name in ("config.yaml", "last.ckpt"):
        Path("runs/rose/001", name).touch()
    return tmp_path


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """A package with configs of its own, as in a wheel; not in a checkout."""
    for name in ("dora", "strategies/ddp", "recipes/long"):
        path = tmp_path / "site" / "package" / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(configs, "_PACKAGE", tmp_path / "site" / "package")
    return tmp_path / "site" / "package" / "configs"


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A comparison of three arms, with tuning and three seeds: its folder, plan and outcomes; it is only read."""
    folder = tmp_path_factory.mktemp("comparison") / "001"
    plan = comparisons.ended(folder, also=("--config", "other"))
    return folder, plan, outcomes(folder, plan)
