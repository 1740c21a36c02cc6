from __future__ import annotations

import comparisons
import pytest
import yaml

from lora_lightning.cli.compare.outcomes import outcomes
from lora_lightning.cli.compare.recommendation import CONFIG, recommend


def said(folder, **changed):
    plan = comparisons.ended(folder, tune_rate=False, **changed)
    return recommend(folder, plan, outcomes(folder, plan))


def test_the_best_where_all_others_are_worse(tmp_path):
    text = said(tmp_path / "001")
    assert text.startswith("Take better: accuracy ")
    assert "the best mean" in text
    assert "Worse than better: first (worse by " in text
    assert yaml.safe_load((tmp_path / "001" / CONFIG).read_text())["seed_everything"] in (0, 1, 2)


def test_the_cheapest_of_those_that_noise_does_not_tell_apart(tmp_path, monkeypatch):
    monkeypatch.setitem(comparisons.RIGHT, "better", 0.607)
    text = said(tmp_path / "001")
    assert text.startswith("Take same: accuracy ")
    assert "no difference found" in text
    assert "It trains 510 numbers, the fewest of the arms that noise does not tell apart (" in text


def test_nothing_that_the_intervals_do_not_carry(tmp_path):
    text = said(tmp_path / "001", seeds=1)
    assert text.startswith("Nothing is recommended: fewer than two arms have two final runs")
    assert not (tmp_path / "001" / CONFIG).exists()


@pytest.mark.parametrize("left", ["first", "better"])
def test_an_arm_that_failed_is_left_out(finished, tmp_path, left):
    _, plan, found = finished
    assert left not in recommend(tmp_path, plan, [one for one in found if one.name != left])
