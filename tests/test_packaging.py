"""The sdist holds all that is needed to build and test; the wheel made of it works without the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import lora_lightning
from lora_lightning import plugins

ROOT = Path(__file__).parent.parent


def build(kind, source, folder):
    """Make the sdist or the wheel of the project in `source`."""
    words = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    subprocess.run(words, cwd=source, check=True, timeout=120, capture_output=True)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def files_in(*folders):
    """Files of the checkout below `folders`, as far as they are part of the project."""
    found = {path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_version_stands_in_one_place(sdist, wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    assert sdist.name == f"lora_lightning-{lora_lightning.__version__}.tar.gz"
    assert wheel.name == f"lora_lightning-{lora_lightning.__version__}-py3-none-any.whl"


def test_the_sdist_holds_all_that_is_needed_to_build_and_test(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = files_in("lora_lightning", "plugins", "configs", "tests", "examples")
    assert needed - names == set()
    assert {"pyproject.toml", "constraints.txt", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"} <= names


def test_the_example_of_a_plugin_is_a_short_package_of_its_own():
    """Its code, tests included, has fewer than 150 lines; its paper is none of the bundled methods'."""
    folder = ROOT / "examples" / "third_party_plugin"
    lines = [line for path in folder.rglob("*.py") for line in path.read_text().splitlines() if line.strip()]
    assert 50 < len(lines) < 150
    assert (folder / "README.md").is_file()
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "lora-lightning-ia3"
    [paper] = re.findall(r'paper: ClassVar\[.*?\] = "(.*?)"', (folder / "ll_ia3" / "method.py").read_text())
    assert paper not in {method.paper for method in plugins.registry().methods.values()}


def test_the_wheel_holds_what_runs_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    core = {name for name in files_in("lora_lightning") if not name.startswith("lora_lightning/notes/")}
    plugins = {name.removeprefix("plugins/") for name in files_in("plugins")}
    configs = {f"lora_lightning/{name}" for name in files_in("configs")}
    about = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    assert names - about == core | plugins | configs
    assert {"lora_lightning/py.typed", "ll_rose/README.md", "lora_lightning/configs/rose.yaml"} <= names
    assert {name.rpartition("/")[2] for name in about} == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "LICENSE"}


@pytest.mark.slow
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
