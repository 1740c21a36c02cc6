"""Notebooks in examples/ run from top to bottom, and are kept without what they printed."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pages import DOCS, README, ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The code cells of a notebook, run in a folder with nothing of the user's around them."""
    nbformat = pytest.importorskip("nbformat", reason="the extra dev has it")
    nbclient = pytest.importorskip("nbclient", reason="the extra dev has it")
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(folder / "jupyter"))
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    texts = [output["text"] for output in cell.outputs if output.get("name") == "stdout"]
    shown = [output["data"]["text/plain"] for output in cell.outputs if output["output_type"] == "display_data"]
    return re.sub(r"\x1b\[[0-9;]*m", "", "".join([*texts, *shown]))


def value(cell: Any) -> Any:
    [found] = [output["data"]["text/plain"] for output in cell.outputs if output["output_type"] == "execute_result"]
    return ast.literal_eval(found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_without_outputs(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    for number, cell in enumerate(cells):
        assert cell["outputs"] == [], f"cell {number}"
        assert cell["execution_count"] is None, f"cell {number}"
        assert cell["metadata"] == {}, f"cell {number}"
    assert set(content["metadata"]) == {"kernelspec", "language_info"}
    assert content["metadata"]["language_info"] == {"name": "python"}


def test_each_notebook_is_linked_from_the_pages():
    assert len(NOTEBOOKS) == 2
    pages = "".join(path.read_text(encoding="utf-8") for path in [README, *DOCS.glob("*.md")])
    for path in NOTEBOOKS:
        assert f"examples/{path.name}" in pages


@pytest.mark.slow
def test_the_journey_from_chats_to_a_model_that_answers(tmp_path, monkeypatch):
    cells = executed("from_chats_to_a_model.ipynb", tmp_path, monkeypatch)
    [shown] = [printed(cell) for cell in cells if "show_examples" in cell.source]
    assert "]]Monday.</s>[[" in shown
    [fitted] = [printed(cell) for cell in cells if "trainer.fit" in cell.source]
    assert "changed     all 35 trained tensors" in fitted
    [answered, base] = [printed(cell) for cell in cells if "stream(" in cell.source]
    assert [line.split("? ")[1].split(" (")[0] for line in answered.splitlines()] == [
        "Tuesday.",
        "Wednesday.",
        "Tuesday.",
    ]
    assert "Tuesday" not in base
    [in_peft] = [printed(cell) for cell in cells if "PeftModel" in cell.source]
    assert in_peft.strip() == "Tuesday."


@pytest.mark.slow
def test_adapters_in_a_project_compared_switched_and_merged(tmp_path, monkeypatch):
    cells = executed("adapters_in_your_project.ipynb", tmp_path, monkeypatch)
    [before] = [value(cell) for cell in cells if "class Project" in cell.source]
    assert before["0 degrees"] > 0.8 > 0.3 > before["90 degrees"]
    [found] = [value(cell) for cell in cells if cell.source.startswith("def adapted")]
    assert set(found) == {"LoRA", "DoRA"}
    assert min(result["accuracy"] for result in found.values()) > 0.6
    [table] = [value(cell) for cell in cells if "set_active(model, active)" in cell.source]
    assert table["none"] == list(before.values())
    assert table["sideways"][1] == found["LoRA"]["accuracy"]
    assert table["upside_down"][2] > before["180 degrees"] + 0.2
    [same] = [value(cell) for cell in cells if cell.source.endswith("\nsame")]
    [plain] = [value(cell) for cell in cells if cell.source.endswith("\nplain")]
    assert same is True
    assert plain is True
    [merged] = [printed(cell) for cell in cells if "ll.merge" in cell.source]
    assert merged.strip().endswith("unmerged again: True")
    assert float(merged.split()[3].rstrip(";")) < 1e-4
