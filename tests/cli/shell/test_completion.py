"""What shells are offered."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy

from ll_optimizers.plus import LoRAPlus
from lora_lightning import plugins
from lora_lightning.callbacks import KeepBest
from lora_lightning.cli.cards import fields_of
from lora_lightning.cli.classes import load_components, named_classes, parameters_of
from lora_lightning.cli.shell.completion import candidates
from lora_lightning.data import Chat, LabelledText
from lora_lightning.registry import LIGHT_VERBS, TRAINING_VERBS
from lora_lightning.training.strategies.fsdp2 import FSDP2


@pytest.fixture(autouse=True)
def everything_loaded():
    plugins.load()


def test_verbs_and_names():
    assert set(candidates([""])) >= {*TRAINING_VERBS, *LIGHT_VERBS, "analyse"}
    assert candidates(["est"]) == ["estimate"]
    assert candidates(["show", "Rose"]) == ["RoseLoRA"]
    assert "LoRAPlus" in candidates(["show", "LoRA"])
    assert candidates(["fit", "-p", "no:ll_ro"]) == ["no:ll_rose"]
    assert candidates(["fit", "--model.method", "Do"]) == ["DoRA"]
    assert "--markdown" in candidates(["estimate", "rose", "--m"])


@pytest.mark.parametrize("words", [["fit", "--config"], ["-c"], ["doctor"], ["targets"], ["estimate", "--config"]])
def test_configs(words):
    assert candidates([*words, "strategies/fsdp"]) == ["strategies/fsdp", "strategies/fsdp2"]


def test_settings_are_those_of_the_signatures():
    from lightning.pytorch import Trainer

    from lora_lightning.training.module import AdapterModule

    for key, cls in (("model", AdapterModule), ("trainer", Trainer)):
        names = {f"--{key}.{name}" for name in inspect.signature(cls).parameters}
        assert set(candidates(["fit", f"--{key}."])) == names


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (["fit", "--config", "rose"], "RoseLoRA"),
        (["fit", "--config", "rose", "--model.method", "DoRA"], "DoRA"),
        (["doctor", "--config", "lora", "--config", "strategies/ddp"], "LoRA"),
    ],
)
def test_settings_of_the_method_that_is_named(words, method):
    expected = {f"--model.method.{card.name}" for card in fields_of(plugins.method(method))}
    assert set(candidates([*words, "--model.method."])) == expected


@pytest.mark.parametrize(
    ("setting", "base", "some"),
    [
        ("data", LightningDataModule, {"Chat", "LabelledText"}),
        ("model.optimizer", torch.optim.Optimizer, {"AdamW", "LoRAPlus", "SlowFast"}),
        ("trainer.callbacks+", Callback, {"KeepBest", "EarlyStopping", "RouterStatistics"}),
        ("trainer.strategy", Strategy, {"ddp", "auto", "FSDP2", "DDPStrategy"}),
    ],
)
def test_values_of_settings_that_take_a_class(setting, base, some):
    """Nothing is offered that the parser would not take."""
    found = set(candidates(["fit", f"--{setting}", ""]))
    assert some <= found
    load_components()
    assert found - {"auto", "ddp"} <= set(named_classes(base))


@pytest.mark.parametrize(
    ("words", "key", "cls"),
    [
        (["--data", "LabelledText"], "data", LabelledText),
        (["--config", "tasks/chat"], "data", Chat),
        (["--config", "tasks/chat", "--data", "lora_lightning.data.LabelledText"], "data", LabelledText),
        (["--config", "lora"], "model.optimizer", torch.optim.AdamW),
        (["--model.optimizer", "LoRAPlus"], "model.optimizer", LoRAPlus),
        (["--config", "lora", "--config", "strategies/fsdp2"], "trainer.strategy", FSDP2),
        (["--trainer.callbacks+", "KeepBest"], "trainer.callbacks", KeepBest),
    ],
)
def test_settings_of_the_class_that_is_named(words, key, cls):
    found = candidates(["fit", *words, f"--{key}."])
    assert set(found) == {f"--{key}.{name}" for name in parameters_of(cls)}
    assert found


def test_settings_of_an_unknown_class_are_none():
    assert candidates(["fit", "--data", "Chatt", "--data."]) == []
    assert candidates(["fit", "--data", "no_such_package.Chat", "--data."]) == []


def test_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/rose/001")
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    assert candidates(["validate", "--run", "runs/"]) == ["runs/rose/001"]
    assert candidates(["fit", "--config", "no-such-config", "--model.meth"]) == ["--model.method"]
