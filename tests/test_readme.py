"""The README is short and true: its commands, its code, its tables, and what it names."""

from __future__ import annotations

import re
import sys
import types

from pages import README, ROOT, methods_in_short, section
from readme_commands import commands

TEXT = README.read_text(encoding="utf-8")


def test_it_is_short():
    assert len(TEXT.splitlines()) < 200


def test_the_two_commands():
    run, test = commands()["run"], commands()["test"]
    assert run == (
        'pip install -c constraints.txt -e ".[demo]" && python -m lora_lightning fit --config configs/rose.yaml'
    )
    assert test == 'pip install -c constraints.txt -e ".[test]" && python -m pytest'


def test_python_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.M | re.S):
        exec(compile(block, "README.md", "exec"), vars(module))
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()


def test_the_method_table_is_current():
    assert section(README, "methods") == methods_in_short(), "python tests/pages.py"


def test_every_page_is_listed():
    """Each page of docs/ but those that only frame others, with the title that it has."""
    frames = {"index.md", "contributing.md", "notes.md"}
    pages = {path.name: path.read_text().splitlines()[0].removeprefix("# ") for path in (ROOT / "docs").glob("*.md")}
    linked = {name: title for title, name in re.findall(r"\[([^\]]+)\]\(docs/([\w.]+)\)", TEXT)}
    assert linked == {name: title for name, title in pages.items() if name not in frames}
