"""Every class of transformers that can be built small: adapters, heads, files and new tokens are right, or refused."""

from __future__ import annotations

import pytest
from class_cells import buildable, outcome, table
from model_classes import TASKS, ModelClass, model_class, model_classes

FAST = ("BertForSequenceClassification", "ViTForImageClassification", "BartForConditionalGeneration")


@pytest.mark.filterwarnings("ignore")  # of models' own code
@pytest.mark.parametrize("name", FAST)
def test_a_class_is_right(name: str) -> None:
    cell = outcome(model_class(name))
    assert cell.refused == {}
    assert cell.unchecked == ""


def test_a_refusal_is_kept_with_its_message() -> None:
    cell = outcome(model_class("CanineForSequenceClassification"))
    assert "takes no new tokens" in cell.refused["new tokens"]


EVERY = 8
"""Of the classes that the slow test takes; `python tests/class_cells.py` takes all, for about a quarter of an hour."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of models' own code
def test_every_eighth_class_is_right_or_refused_before_training() -> None:
    cells, wrong = {}, []
    for number, found in enumerate(buildable()):
        if number % EVERY:
            continue
        try:
            cells[found] = outcome(found)
        except Exception as error:
            wrong.append(f"{found.name}: {error}")
    assert wrong == []
    assert len(cells) > 450 / EVERY
    assert "Leave new_tokens out" in table(cells)


def test_each_class_comes_once() -> None:
    found: list[ModelClass] = list(model_classes())
    assert len({one.name for one in found}) == len(found) > 500
    assert {one.task for one in found} == set(TASKS)
