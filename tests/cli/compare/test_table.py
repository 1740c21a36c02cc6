from __future__ import annotations

import math

import comparisons
import pytest

from lora_lightning.cli.compare import table
from lora_lightning.cli.compare.outcomes import outcomes


def test_the_table_and_what_it_says(finished):
    _, plan, found = finished
    lines = table.markdown(plan, found).splitlines()
    heads = lines[0].strip("| ").split(" | ")
    assert heads[:4] == ["arm", "accuracy", "difference to first", "p"]
    assert heads[-1] == "change of accuracy beside"
    rows = [line.strip("|").split(" | ") for line in lines[2:]]
    assert all(len(row) == len(heads) for row in rows)
    assert rows[1][heads.index("trained")] == "2,010"
    assert rows[1][heads.index("ms a step")] == "50.0"
    assert rows[0][-1].strip() == "-1.00"
    said = table.sentences(plan, found)
    assert said[0].startswith("better against first: better by ")
    assert said[1].startswith("same against first: no difference found; up to ")
    assert "validation accuracy" in table.text(plan, found)


def test_one_seed_says_nothing(tmp_path):
    plan = comparisons.ended(tmp_path / "001", seeds=1, tune_rate=False)
    said = table.sentences(plan, outcomes(tmp_path / "001", plan))
    assert said[0] == "better against first: of one seed nothing can be said; --seeds 3 takes three."


def test_a_rate_on_the_edge_is_marked(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_lightning.cli.compare.search.MOST_MOVES", 0)
    plan = comparisons.ended(tmp_path / "001")
    found = outcomes(tmp_path / "001", plan)
    assert "(edge)" in table.markdown(plan, found)
    assert "first: its best rate, 0.00316, is the highest that was tried; the best may lie beyond." in table.sentences(
        plan, found
    )


@pytest.mark.parametrize(
    ("value", "metric", "shown"), [(0.5, "accuracy", "50.00"), (2.5, "loss", "2.5000"), (math.nan, "loss", "-")]
)
def test_numbers(value, metric, shown):
    assert table.number(value, metric) == shown


def test_sizes():
    assert table.size(math.nan, 2.0**31) == "2.00 GiB"
    assert table.size(2.0**21) == "2.0 MiB"
    assert table.size(math.nan) == "-"
