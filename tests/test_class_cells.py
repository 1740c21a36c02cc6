"""Every class of transformers that can be built small: adapters, heads, files and new tokens are right, or refused."""

from __future__ import annotations

import re

import pytest
from class_cells import PAGE, Cell, lines_of, outcome, page, run, whole
from model_classes import TASKS, ModelClass, model_class, model_classes

FAST = ("BertForSequenceClassification", "ViTForImageClassification", "BartForConditionalGeneration")


@pytest.mark.filterwarnings("ignore")  # of models' own code
@pytest.mark.parametrize("name", FAST)
def test_a_class_is_right(name: str) -> None:
    cell = outcome(model_class(name))
    assert cell.refused == {}
    assert cell.unchecked == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of models' own code
@pytest.mark.parametrize(
    "name",
    [
        "GptOssForCausalLM",  # matrices of experts that are stored transposed
        "LongformerForTokenClassification",  # products that sum in another order where a weight requires a gradient
        "WavLMForSequenceClassification",
        "FalconMambaForCausalLM",
    ],
)
def test_a_class_that_once_started_nearly_at_the_base_starts_there(name: str) -> None:
    assert outcome(model_class(name)).unchecked == ""


@pytest.mark.filterwarnings("ignore")  # of models' own code
def test_a_refusal_is_kept_with_its_message() -> None:
    cell = outcome(model_class("CanineForSequenceClassification"))
    assert "takes no new tokens" in cell.refused["new tokens"]


def test_the_page_says_what_came_of_each_class() -> None:
    right, refused, lost = (model_class(f"{name}ForMaskedLM") for name in ("Bert", "Esm", "Luke"))
    cells = {
        right: Cell({}, (), ""),
        refused: Cell({"new tokens": "EsmForMaskedLM keeps a | bias."}, (), ""),
        lost: Cell({}, ("e2e_query", "w2e_query"), ""),
    }
    text = page(cells)
    assert "| masked LM | 3 | 1 |" in text
    assert "| together | 3 | 1 |" in text
    assert r"| EsmForMaskedLM | new tokens | it keeps a \| bias. |" in text
    assert "| LukeForMaskedLM | gradient | e2e_query, w2e_query |" in text
    assert "`BertForMaskedLM`." in text
    assert whole(cells[right])
    assert not lines_of(right, cells[right])


PARTS = 12


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_class_is_right_or_refused_as_the_page_says(part: int) -> None:
    """Else write it anew: `python tests/class_cells.py`."""
    came = dict(run(part=part, parts=PARTS))
    assert {found.name: cell for found, cell in came.items() if isinstance(cell, str)} == {}
    assert len(came) > 30
    told = PAGE.read_text(encoding="utf-8")
    lines = {found.name: set(re.findall(rf"^\| {found.name} \|.*$", told, flags=re.M)) for found in came}
    cells = {found: cell for found, cell in came.items() if isinstance(cell, Cell)}
    assert lines == {found.name: lines_of(found, cell) for found, cell in cells.items()}
    right = [found.name for found, cell in cells.items() if whole(cell)]
    assert [found.name for found in cells if f"`{found.name}`" in told] == right


def test_each_class_comes_once() -> None:
    found: list[ModelClass] = list(model_classes())
    assert len({one.name for one in found}) == len(found) > 500
    assert {one.task for one in found} == set(TASKS)
