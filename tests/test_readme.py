"""The README is true: its code runs, its tables are current, its hooks have their exact signatures."""

from __future__ import annotations

import inspect
import re
import sys
import types
from pathlib import Path

import pytest
from readme_commands import README, commands

from lora_lightning import hookspecs, plugins
from lora_lightning.__main__ import main
from lora_lightning.argv import config_names, find_config
from lora_lightning.verbs.methods import markdown_table

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


def test_files_and_configs_it_names_exist():
    root = README.parent
    for name in re.findall(r"`((?:tests|lora_lightning|plugins|configs)/[\w/.]+)`", TEXT):
        assert (root / name).exists(), name
    for name in re.findall(r"--config (\w[\w/.]*)", TEXT):
        assert Path(find_config(name if name in config_names() else str(root / name))).is_file()
