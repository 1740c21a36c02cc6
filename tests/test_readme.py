"""The README is true: its code runs, its tables are current, its hooks have their exact signatures."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from readme_commands import README, commands

import lora_lightning
from lora_lightning import hookspecs, plugins
from lora_lightning.cli.configs import config_names, find_config
from lora_lightning.cli.main import main
from lora_lightning.cli.verbs.methods import markdown_table
from lora_lightning.registry import LIGHT_VERBS, TRAINING_VERBS

TEXT = README.read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.M | re.S)


def test_the_two_commands():
    run, test = commands()["run"], commands()["test"]
    assert run == (
        'pip install -c constraints.txt -e ".[demo]" && python -m lora_lightning fit --config configs/rose.yaml'
    )
    assert test == 'pip install -c constraints.txt -e ".[test]" && python -m pytest'


def test_python_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks("python")
    assert len(found) >= 4
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    namespace = vars(module)
    for block in found:
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()
    assert namespace["TestTinyLoRA"].method.rank == 2


def test_the_plugin_of_the_readme_passes_its_contract(tmp_path):
    found = "\n".join(blocks("python")[-2:])
    file = tmp_path / "test_tiny.py"
    file.write_text(found)
    assert pytest.main([str(file), "-q", "-p", "no:cacheprovider", "-k", "start or merge"]) == 0


def test_the_method_table_is_current():
    generated = TEXT.partition("<!-- methods:")[2].partition("-->\n")[2].partition("<!-- end of methods -->")[0]
    assert generated.strip() == markdown_table(plugins.load()).strip(), "python -m lora_lightning methods --markdown"


@pytest.mark.slow
def test_the_plan_is_current(capsys):
    generated = TEXT.partition("<!-- plan:")[2].partition("-->\n")[2].partition("<!-- end of plan -->")[0]
    words = re.search(r"llama_2_7b (--.*?);", TEXT)[1].split()
    titles = {"Llama-2-7B": "llama_2_7b", "Llama-3-70B": "llama_3_70b", "Llama-3.1-405B": "llama_3_405b"}
    for title, name in titles.items():
        assert main(["estimate", f"shapes/{name}", *words]) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        assert f"**{title}**\n\n" + "\n".join(lines) in generated, name


def test_every_hook_stands_there_with_its_signature():
    hooks = [
        f for _, f in inspect.getmembers(hookspecs, inspect.isfunction) if f.__name__.startswith("lora_lightning_")
    ]
    assert hooks
    for hook in hooks:
        assert f"{hook.__name__}{inspect.signature(hook)}" in TEXT
        assert inspect.getdoc(hook).splitlines()[0] in " ".join(TEXT.split())


def test_every_verb_has_its_call_in_python():
    """Each verb stands in the table, and what stands beside it exists."""
    table = TEXT.partition("| command | in Python |")[2].partition("\n\n")[0]
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| ") and "---" not in row]
    verbs = {verb for row in rows for verb in re.findall(r"`([\w-]+)", row[0])}
    assert verbs == {*TRAINING_VERBS, *LIGHT_VERBS}
    calls = " ".join(row[1] for row in rows)
    for module, name in re.findall(r"\b(lora_lightning(?:\.\w+)+)\.(\w+)\(", calls):
        assert callable(getattr(importlib.import_module(module), name)), name
    for name in re.findall(r"\bll\.(\w+)\(", calls):
        assert callable(getattr(lora_lightning, name)), name


def test_what_plugin_authors_may_rely_on_exists():
    """Each name of CONTRIBUTING's promise; the range of versions it gives is that of this interface."""
    contributing = (README.parent / "CONTRIBUTING.md").read_text()
    promise = contributing.partition("## What plugin authors may rely on")[2].partition("\n## ")[0]
    assert hookspecs.API in SpecifierSet(re.search(r'`requires_api = "(.*?)"`', promise)[1])
    assert "for two minor releases of the package, and at least six months" in " ".join(promise.split())
    homes = [
        "methods",
        "adapters.base",
        "adapters.layers.base",
        "adapters.layers.quantized",
        "callbacks.schedule",
        "errors",
        "testing",
    ]
    homes += ["optim.pair_optimizer", "data.text", "data.table", "exporters.source", "exporters.report"]
    known = {name for home in homes for name in vars(importlib.import_module(f"lora_lightning.{home}"))}
    names = set(re.findall(r"`([A-Z]\w+|check\w*)`", promise)) - {"API", "DeprecationWarning"}
    assert len(names) > 12
    assert names <= known


def test_files_and_configs_it_names_exist():
    root = README.parent
    for name in re.findall(r"`((?:tests|lora_lightning|plugins|configs)/[\w/.]+)`", TEXT):
        assert (root / name).exists(), name
    for name in re.findall(r"--config (\w[\w/.]*)", TEXT):
        assert Path(find_config(name if name in config_names() else str(root / name))).is_file()
