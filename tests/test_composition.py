"""Any adapter with any optimizer and any schedule trains and resumes exactly, or is refused before the first step."""

from __future__ import annotations

import pytest
from composition import ADAPTERS, CELLS, DIAGONAL, OPTIMIZERS, SCHEDULES, TRAINS, outcome, table
from pages import DOCS, section
from toy_runs import encoder_folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"), dropout=0.1)


def told(cell):
    """What docs/optimizers.md says of a cell."""
    text = section(DOCS / "optimizers.md", "composition")
    rows = {tuple(row.strip(" |").split(" | ")[:2]): row.strip(" |").split(" | ")[2:] for row in text.splitlines()}
    shown = rows[cell[:2]][list(SCHEDULES).index(cell[2])]
    if shown == "yes":
        return TRAINS
    number = shown.removeprefix("no (").removesuffix(")")
    return next(line.partition(". ")[2] for line in text.splitlines() if line.startswith(f"{number}. "))


def test_the_diagonal_has_every_part_once():
    for index, parts in enumerate((ADAPTERS, OPTIMIZERS, SCHEDULES)):
        assert {cell[index] for cell in DIAGONAL} == set(parts)


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=() if cell in DIAGONAL else pytest.mark.slow, id="-".join(cell)) for cell in CELLS],
)
def test_a_cell(cell, encoder, tmp_path):
    assert outcome(cell, encoder, tmp_path) == told(cell)


def test_the_table_names_each_reason_once():
    outcomes = dict.fromkeys(CELLS, TRAINS) | {CELLS[0]: "why", CELLS[5]: "why", CELLS[7]: "other"}
    text = table(outcomes)
    assert text.count("no (1)") == 2
    assert text.count("no (2)") == 1
    assert "1. why\n2. other" in text
