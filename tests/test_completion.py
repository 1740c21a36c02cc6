"""What shells are offered, and the script in a real bash."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lightning import argv, plugins
from lora_lightning.__main__ import main
from lora_lightning.cards import fields_of
from lora_lightning.completion import candidates


@pytest.fixture(autouse=True)
def everything_loaded():
    plugins.load()


def test_verbs_and_names():
    assert set(candidates([""])) >= {*argv.TRAINING_VERBS, *argv.LIGHT_VERBS, "analyse"}
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

    from lora_lightning.module import AdapterModule

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


def test_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/rose/001")
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    assert candidates(["validate", "--run", "runs/"]) == ["runs/rose/001"]
    assert candidates(["fit", "--config", "no-such-config", "--model.meth"]) == ["--model.method"]


def test_another_shell_is_an_error(capsys):
    assert main(["completion", "fish"]) == 2
    assert capsys.readouterr().err == 'error: completion: there is no script for "fish"; nearest: bash.\n'


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_and_imports_nothing_heavy(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    ask = """
ask() { COMP_LINE="$1"; COMP_POINT=${#COMP_LINE}; _lora_lightning; printf '%s\\n' "${COMPREPLY[@]}" "--"; }
"""
    lines = [
        f"{sys.executable} -m lora_lightning val",
        f"{sys.executable} -m lora_lightning fit -p no:ll_ro",
        "python x ",
    ]
    calls = "\n".join(f'ask "{line}"' for line in lines)
    result = subprocess.run(
        ["bash", "-c", f"source {script}\n{ask}\n{calls}"], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stderr == ""
    assert result.stdout.split() == ["validate", "--", "ll_rose", "--", "--"]
    loaded = "import sys; from lora_lightning.completion import candidates; candidates(['fit', '--t'])\n"
    loaded += "assert not {'torch', 'lightning', 'jsonargparse', 'numpy'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", loaded], timeout=120, check=True)
