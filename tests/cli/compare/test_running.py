from __future__ import annotations

import json
import shutil

import comparisons
import pytest

from lora_lightning.cli.compare.plan import Plan
from lora_lightning.cli.compare.running import finish, progress, run_all, status
from lora_lightning.cli.compare.studies import Studies
from lora_lightning.errors import SettingsError


def test_what_a_comparison_leaves(tmp_path):
    folder = tmp_path / "001"
    plan = comparisons.ended(folder, tune_rate=False)
    text = finish(folder, plan, recommend=True)
    assert "better against first: better by " in text
    assert "Take better: " in text
    for name in ("table.md", "results.json", "report.html", "report.png", "recommended.yaml"):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "results.json").read_text())["comparison"]["metric"] == "accuracy"


def test_nothing_is_run_where_all_has_ended(tmp_path):
    folder = tmp_path / "001"
    plan = comparisons.ended(folder, tune_rate=False)
    assert run_all(folder, plan, 1, None) == ""
    with pytest.raises(SettingsError, match=r"--jobs is 0; it must be at least 1"):
        run_all(folder, plan, 0, None)


def test_how_far_it_has_come(tmp_path):
    plan = comparisons.plan(seeds=2)
    plan.write(tmp_path)
    studies = Studies(tmp_path, plan)
    assert progress(plan, studies).line() == "0 of about 21 runs have ended, 0 at work"
    job = studies.take()
    comparisons.write_run(job, 0.5)
    assert progress(plan, studies).running == 1
    assert status(tmp_path).startswith("0 of about 21 runs have ended, 1 at work")


def test_the_time_that_is_left(finished):
    _, plan, _ = finished
    now = progress(plan, Studies(finished[0], plan))
    assert now.ended == now.expected
    assert now.line() == f"{now.ended} of about {now.ended} runs have ended, 0 at work"
    some = type(now)(ended=3, running=1, expected=63, seconds=60.0)
    assert some.line() == "3 of about 63 runs have ended, 1 at work, about 1 h 00 min left"
    assert some.line(jobs=2).endswith("about 30 min left")


def test_a_folder_can_be_moved(finished, tmp_path):
    """Only the number of a comparison names its studies, and files lie below its folder."""
    shutil.copytree(finished[0], tmp_path / "001")
    assert status(tmp_path / "001") == status(finished[0])
    assert Plan.read(tmp_path / "001") == finished[1]
