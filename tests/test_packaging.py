"""The wheel holds core, plugins, cards and configs, and works from an empty folder without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lora_lightning

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, timeout=120)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_what_it_should(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith(f"lora_lightning-{lora_lightning.__version__}-")
    for needed in (
        "lora_lightning/configs/rose.yaml",
        "lora_lightning/py.typed",
        "ll_rose/README.md",
        "ll_lora/settings.py",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests/", "plugins/", "lora_lightning/notes/"))]


def test_the_installed_wheel_finds_its_plugins_and_configs(wheel, tmp_path):
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    script = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import lora_lightning, lora_lightning.__main__ as main; "
        f"assert lora_lightning.__file__.startswith({str(target)!r}); raise SystemExit(main.main(sys.argv[1:]))"
    )
    for words, shown in ((["methods"], "RoseLoRA"), (["cite", "rose"], "wang2024roselora")):
        done = subprocess.run(
            [sys.executable, "-c", script, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(target)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout
