"""`new-plugin`: what it writes and what it refuses; tests/test_third_party.py installs and runs it."""

import ast
import importlib
import inspect
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


# -- what a plugin may import ------------------------------------------------------------------------------------------


def promised():
    """Names by module, as the table in docs/plugins.md lists them."""
    page = (ROOT / "docs" / "plugins.md").read_text()
    table = page.partition("## What a plugin may import\n")[2].partition("\n## ")[0]
    found = {}
    for module, text in re.findall(r"^\| `([\w.]+)` \| (.+) \|$", table, re.M):
        names = set(re.findall(r"`(\w+)`", text)) - {"__all__"}
        home = importlib.import_module(module)
        if "__all__" in text:
            names |= set(home.__all__)
        if "error classes" in text:
            names |= {n for n, v in vars(home).items() if isinstance(v, type) and issubclass(v, Exception)}
        found[module] = found.get(module, set()) | names
    return found


def imported(source):
    """Module and name of each import from core, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lora_lightning":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if a.name.partition(".")[0] == "lora_lightning")


def strangers(source):
    table = promised()
    return [(module, name) for module, name in imported(source) if name not in table.get(module, set()) | {""}]


def test_the_table_lists_names_that_there_are():
    table = promised()
    assert len(table) > 15
    for module, names in table.items():
        assert names, module
        for name in names:
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
            assert not name.startswith("_")


def test_what_contributing_promises_is_in_the_table():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    text = page.partition("## What plugin authors may rely on\n")[2].partition("\n## ")[0]
    listed = text.partition("These are part of the interface:")[2].partition("Names with an underscore")[0]
    names = set(re.findall(r"`([A-Z]\w+|check\w*)`", listed))
    assert {"Method", "Adapter", "QuantizedBase", "check_fields"} <= names
    assert names <= set().union(*promised().values())


def test_what_it_writes_imports_promised_names_only():
    assert strangers("from lora_lightning.adapters.base import Adapter, trains\nimport lora_lightning as ll") == [
        ("lora_lightning.adapters.base", "trains")
    ]
    assert strangers("def f():\n    from lora_lightning.registry import Registry") == [
        ("lora_lightning.registry", "Registry")
    ]
    assert main(["new-plugin", "Tilt", "--output", "made"]) == 0
    files = sorted(Path("made").rglob("*.py"))
    assert len(files) == 5
    assert {str(file): names for file in files if (names := strangers(file.read_text()))} == {}


@pytest.mark.parametrize("package", ["third_party_plugin", "other_parts_plugin"])
def test_the_packages_among_the_examples_import_promised_names_only(package):
    files = sorted((ROOT / "examples" / package).rglob("*.py"))
    assert files
    assert {file.name: names for file in files if (names := strangers(file.read_text()))} == {}


def test_the_blocks_of_the_page_import_promised_names_only():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "plugins.md").read_text(), re.M | re.S)
    assert len(blocks) >= 3
    assert [names for block in blocks if (names := strangers(block))] == []


EXPLAINED = [
    "methods.Method",
    "adapters.base.Adapter",
    "adapters.base.FactorPair",
    "adapters.base.EntryMask",
    "adapters.base.GroupSpec",
    "adapters.base.RunningSum",
    "adapters.layers.base.BaseLayer",
    "adapters.linked.Linked",
    "callbacks.schedule.ScheduleCallback",
    "exporters.report.Written",
    "exporters.source.Source",
    "injection.probe.Probe",
]


def fields(cls):
    """Public attributes that a class declares and that are neither methods nor properties."""
    plain = {name for name, value in vars(cls).items() if not (callable(value) or hasattr(type(value), "__get__"))}
    return {name for name in plain | set(vars(cls).get("__annotations__", {})) if not name.startswith("_")}


@pytest.mark.parametrize("path", EXPLAINED)
def test_help_explains_each_field_of_what_an_author_meets(path):
    """A string under a field is invisible in `help()`, so the class's docstring has a line for each."""
    module, _, name = f"lora_lightning.{path}".rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    assert name in promised()[module]
    if path == "callbacks.schedule.ScheduleCallback":
        assert {"requires", "writes_values"} <= fields(cls)
    declared = set().union(*(fields(base) for base in cls.__mro__ if base.__module__.startswith("lora_lightning")))
    silent = [field for field in sorted(declared) if not re.search(rf"^ +{field}: \S", inspect.getdoc(cls), re.M)]
    assert not silent


def test_help_of_a_schedule_explains_the_phases():
    from lora_lightning.callbacks import step_counting
    from lora_lightning.callbacks.schedule import ScheduleCallback

    phases = {n for n, v in vars(step_counting).items() if n.isupper() and isinstance(v, int)}
    assert phases == promised()["lora_lightning.callbacks.step_counting"]
    for cls in (step_counting.StepCallback, ScheduleCallback):
        for phase in phases:
            assert f"`{phase}` ({getattr(step_counting, phase)})" in inspect.getdoc(cls)
