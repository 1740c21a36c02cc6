from __future__ import annotations

import comparisons
import pytest

from lora_lightning.cli.compare.outcomes import outcomes


@pytest.fixture
def found(finished):
    return {one.name: one for one in finished[2]}


def test_values_costs_and_files_are_those_of_the_final_runs(found):
    first = found["first"]
    assert [run.seed for run in first.finals] == [0, 1, 2]
    assert first.mean == pytest.approx(comparisons.RIGHT["first"], abs=0.05)
    assert first.cost("step_seconds") == pytest.approx(0.05)
    assert first.file_bytes == 2048
    assert first.best_run.value == max(first.values)
    assert first.best["lr"] == pytest.approx(3.16e-3, rel=0.15)
    assert not first.on_edge


def test_differences_are_to_the_first_arm_over_rows_and_seeds(found):
    assert found["first"].difference is None
    assert found["better"].difference.verdict == "better"
    assert found["better"].difference.over_rows
    assert found["better"].difference.mean == pytest.approx(0.1, abs=0.04)
    assert found["same"].difference.verdict == "no difference found"


def test_what_was_measured_beside_is_a_change_by_seed(found):
    assert found["first"].forgetting("accuracy") == pytest.approx([0.0, -0.01, -0.02])
    assert found["first"].forgetting("loss") == []


def test_a_run_that_left_no_rows_is_compared_by_seeds(tmp_path):
    plan = comparisons.ended(tmp_path / "001", tune_rate=False)
    for file in (tmp_path / "001").rglob("rows.npz"):
        file.unlink()
    better = outcomes(tmp_path / "001", plan)[1]
    assert not better.difference.over_rows
