"""The marks of the contract suite are known to pytest in a package that configures nothing."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lightning.testing as testing
from lora_lightning import plugins
from lora_lightning.cli.main import main
from lora_lightning.pytest_plugin import MARKERS

BUILT_IN = {"filterwarnings", "parametrize", "skip", "skipif", "usefixtures", "xfail"}


def run(*words: str, cwd: Path, path: Path | None = None) -> tuple[int, str]:
    """Exit code and output of Python in a folder outside this repository, so that no configuration of ours is read."""
    found = [str(path)] if path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*found, *filter(None, sys.path)])}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200
    )
    return done.returncode, done.stdout + done.stderr


def test_it_is_what_pytest_loads_of_this_library() -> None:
    [entry] = importlib.metadata.entry_points(group="pytest11", name="lora_lightning")
    assert entry.value == "lora_lightning.pytest_plugin"


def test_every_mark_that_the_suite_uses_is_registered() -> None:
    used = {
        node.attr
        for file in Path(testing.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark"
    }
    assert used - BUILT_IN == {marker.partition(":")[0] for marker in MARKERS} == {"slow"}


def test_a_mark_of_ours_is_known_and_another_is_not(tmp_path: Path) -> None:
    (tmp_path / "test_marks.py").write_text("import pytest\n\n@pytest.mark.slow\ndef test_it():\n    pass\n")
    code, out = run(
        "-m", "pytest", "--strict-markers", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/own", cwd=tmp_path
    )
    assert (code, "1 passed" in out) == (0, True), out
    (tmp_path / "test_marks.py").write_text("import pytest\n\n@pytest.mark.slwo\ndef test_it():\n    pass\n")
    code, out = run(
        "-m", "pytest", "--strict-markers", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/own", cwd=tmp_path
    )
    assert code != 0
    assert "'slwo' not found in `markers` configuration option" in out


def test_a_run_of_pytest_imports_neither_torch_nor_lightning_for_it(tmp_path: Path) -> None:
    (tmp_path / "test_light.py").write_text(
        "import sys\n\ndef test_it():\n    assert 'lora_lightning.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules)\n"
    )
    code, out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/own", cwd=tmp_path)
    assert code == 0, out


@pytest.mark.slow
def test_a_package_that_new_plugin_wrote_is_collected_with_strict_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", "Tilt", "--output", "made"]) == 0
    plugins.load()
    info = tmp_path / "made" / "ll_tilt-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ll-tilt\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[lora_lightning]\nll_tilt = ll_tilt\n")
    words = [
        "-m",
        "pytest",
        "--strict-markers",
        "--strict-config",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path}/own",
    ]
    code, out = run(*words, "--collect-only", "-m", "slow", cwd=tmp_path / "made", path=tmp_path / "made")
    assert code == 0, out
    assert re.search(r"test_quantized_base_compiles\[nf4\]", out), out
    assert "PytestUnknownMarkWarning" not in out
