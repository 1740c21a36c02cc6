"""The pages are true: their code runs, what the code generates is current, and what they name exists."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from pages import CONTRIBUTING, DOCS, PARTS, README, ROOT, folders, hook_functions, rows, section

import lora_lightning
from lora_lightning import hookspecs
from lora_lightning.cli import build
from lora_lightning.cli.configs import config_names, find_config
from lora_lightning.cli.main import main
from lora_lightning.plugins import registry
from lora_lightning.registry import LIGHT_VERBS, TRAINING_VERBS

PAGES = sorted(DOCS.glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in [README, CONTRIBUTING, *PAGES]}
CARDS = {path.parent.name: path.read_text(encoding="utf-8") for path in ROOT.glob("plugins/*/README.md")}
VERBS = {*TRAINING_VERBS, *LIGHT_VERBS}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def shell_lines(text: str) -> list[str]:
    """Lines of indented blocks, those that go on joined."""
    lines = re.findall(r"^ {4}(\S.*(?:\\\n.*)*)", text, flags=re.M)
    return [" ".join(line.replace("\\\n", " ").split()) for line in lines]


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if blocks(text, "python")])
def test_python_blocks_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks(TEXTS[page], "python"):
        exec(compile(block, page, "exec"), vars(module))


def test_the_plugin_of_the_page_passes_its_contract(tmp_path):
    file = tmp_path / "test_tiny.py"
    file.write_text("\n".join(blocks(TEXTS["plugins.md"], "python")))
    assert (
        pytest.main([str(file), "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/own", "-k", "start or merge"])
        == 0
    )


@pytest.mark.parametrize("page", [name for name, text in (TEXTS | CARDS).items() if blocks(text, "yaml")])
def test_yaml_blocks_are_configs(page, tmp_path):
    file = tmp_path / "block.yaml"
    for block in blocks((TEXTS | CARDS)[page], "yaml"):
        file.write_text(block)
        module, _ = build(["--config", "lora", "--config", str(file)])
        method = yaml.safe_load(block)["model"].get("method", {"class_path": "LoRA"})
        assert type(module.method).__name__ == method["class_path"]


# -- what comes from the code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "name"), PARTS, ids=lambda value: getattr(value, "stem", value))
def test_a_generated_part_is_current(page, name):
    assert section(page, name) == PARTS[page, name](), "python tests/pages.py"


@pytest.mark.slow
def test_the_plan_is_current(capsys):
    text = TEXTS["performance.md"]
    generated = section(DOCS / "performance.md", "plan")
    words = re.search(r"llama_2_7b (--.*?);", text)[1].split()
    titles = {"Llama-2-7B": "llama_2_7b", "Llama-3-70B": "llama_3_70b", "Llama-3.1-405B": "llama_3_405b"}
    for title, name in titles.items():
        assert main(["estimate", f"shapes/{name}", *words]) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        assert f"**{title}**\n\n" + "\n".join(lines) in generated, name


def test_every_hook_stands_there_with_its_signature():
    assert hook_functions()
    for hook in hook_functions():
        signature = str(inspect.signature(hook)).replace("'", "")
        assert f"{hook.__name__}{signature}" in TEXTS["plugins.md"]
        assert inspect.getdoc(hook).splitlines()[0] in " ".join(TEXTS["plugins.md"].split())


def test_every_verb_has_its_call_in_python():
    """Each verb stands in the table, and what stands beside it exists."""
    table = TEXTS["python.md"].partition("| command | in Python |")[2].partition("\n\n")[0]
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| ") and "---" not in row]
    assert {verb for row in rows for verb in re.findall(r"`([\w-]+)", row[0])} == VERBS
    calls = " ".join(row[1] for row in rows)
    for module, name in re.findall(r"\b(lora_lightning(?:\.\w+)+)\.(\w+)\(", calls):
        assert callable(getattr(importlib.import_module(module), name)), name
    for name in re.findall(r"\bll\.(\w+)\(", calls):
        assert callable(getattr(lora_lightning, name)), name


def test_what_plugin_authors_may_rely_on_exists():
    """Each name of CONTRIBUTING's promise; the range of versions it gives is that of this interface."""
    promise = TEXTS["CONTRIBUTING.md"].partition("## What plugin authors may rely on")[2].partition("\n## ")[0]
    assert hookspecs.API in SpecifierSet(re.search(r'^requires_api = "(.*?)"$', promise, flags=re.M)[1])
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


def test_the_table_of_folders_is_near_enough():
    """Every plugin, and its code lines within a tenth: `python tests/pages.py` counts them anew."""
    told = {name: int(number) for name, number in rows(section(CONTRIBUTING, "folders"))[1:]}
    counted = {name: int(number) for name, number in rows(folders())[1:]}
    assert told == pytest.approx(counted, rel=0.1)


# -- what they name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXTS)
def test_files_and_configs_it_names_exist(page):
    text = TEXTS[page]
    for name in re.findall(r"`((?:tests|lora_lightning|plugins|configs|examples)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"--config (\w[\w/.]*)", text):
        assert Path(find_config(name if name in config_names() else str(ROOT / name))).is_file()
    for name in re.findall(r"\bpython ((?:tests|examples)/[\w/.]+)", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", TEXTS)
def test_commands_it_names_exist(page):
    """Each verb, and each config behind a verb that takes one."""
    for line in [*shell_lines(TEXTS[page]), *re.findall(r"`(python -m lora_lightning [^`]+)`", TEXTS[page])]:
        for verb, behind in re.findall(r"python -m lora_lightning (\w[\w-]*) ?([\w/.-]*)", line):
            assert verb in VERBS | registry().commands.keys(), line
            if verb in ("targets", "estimate", "inspect-data", "cite") and not behind.startswith("-"):
                find_config(behind if behind in config_names() else str(ROOT / behind))


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    """Files and headings; pages that the site makes of cards and notes are linked where they lie."""
    path = next(path for path in [README, CONTRIBUTING, *PAGES] if path.name == page)
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        file, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.M)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link


def test_every_extra_of_users_stands_in_the_table():
    """Those that developers install are in CONTRIBUTING."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
    named = re.findall(r"^\| `(\w+)` \|", TEXTS["start.md"].partition("| extra |")[2].partition("\n\n")[0], re.M)
    assert set(named) == project["optional-dependencies"].keys() - {"dev", "docs", "test"}
