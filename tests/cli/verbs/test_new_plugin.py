"""`new-plugin`: what it writes and what it refuses; tests/test_third_party.py installs and runs it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lightning import plugins
from lora_lightning.cli.main import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    plugins.load()


def test_it_writes_a_whole_package(capsys):
    assert main(["new-plugin", "RoseTune"]) == 0
    out = capsys.readouterr().out
    folder = Path("lora-lightning-rosetune")
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert written == [
        "ll_rosetune/README.md",
        "ll_rosetune/__init__.py",
        "ll_rosetune/adapter.py",
        "ll_rosetune/callback.py",
        "ll_rosetune/method.py",
        "pyproject.toml",
        "tests/test_ll_rosetune.py",
    ]
    for name in written:
        assert str(folder / name) in out
        assert not re.search(r"\$\w|\$\{", (folder / name).read_text())
    assert 'try next: cd lora-lightning-rosetune && pip install -e ".[test]" && python -m pytest' in out


@pytest.mark.skipif(shutil.which("ruff") is None, reason="ruff is part of the extra dev")
@pytest.mark.parametrize("name", ["Tilt", "ZeroOrderLoRA2"])
def test_it_keeps_to_our_own_style(name):
    assert main(["new-plugin", name, "--output", "made"]) == 0
    for words in (["check"], ["format", "--check", "--diff"]):
        command = ["ruff", *words, "--no-cache", "--config", str(ROOT / "pyproject.toml"), "."]
        done = subprocess.run(command, cwd="made", capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("my-plugin", r'it must be a class name: a capital letter, then .* Did you mean "MyPlugin"\?'),
        ("rose", r'it must be a class name: a capital letter, then .* Did you mean "Rose"\?'),
        ("3", r"it must be a class name: a capital letter, then letters and digits\.$"),
        ("LoRA", r'NAME is "LoRA"; ll_lora \(lora-lightning \S+\) provides that method\. Take another\.'),
        ("Rose", r'NAME is "Rose"; a package ll_rose is installed already\. Take another\.'),
        ("None", r'NAME is "None", which means something else in Python code; take another\.'),
        ("Tensor", r'NAME is "Tensor", which means something else in Python code; take another\.'),
    ],
)
def test_names_it_refuses(name, text, capsys):
    assert main(["new-plugin", name]) == 2
    assert re.search(text, capsys.readouterr().err.strip())
    assert not list(Path().iterdir())


def test_it_writes_over_nothing(capsys):
    Path("there").mkdir()
    assert main(["new-plugin", "Tilt", "--output", "there"]) == 2
    assert capsys.readouterr().err == ('error: new-plugin: "there" exists already; give a new folder with --output.\n')
    assert not list(Path("there").iterdir())
    Path("file").write_text("")
    assert main(["new-plugin", "Tilt", "--output", "file/inside"]) == 2
    assert re.search(r'error: new-plugin: "file.inside" cannot be written: .+', capsys.readouterr().err)


def test_it_imports_nothing_heavy():
    script = (
        "import sys; from lora_lightning.__main__ import main; assert main(['new-plugin', 'Tilt']) == 0\n"
        "sys.exit(' '.join({'torch', 'lightning', 'numpy'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
