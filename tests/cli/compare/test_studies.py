from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import comparisons
import pytest
from optuna.trial import TrialState

from lora_lightning.cli.compare.plan import TUNING_SEED, Plan
from lora_lightning.cli.compare.studies import Job, Studies, check_spaces, folder_in, open_storage
from lora_lightning.errors import RunFolderError, SettingsError


def begun(folder: Path, **changed) -> Studies:
    plan = comparisons.plan(**changed)
    plan.write(folder)
    return Studies(folder, plan)


def all_jobs(studies, value=lambda job: 0.5):
    found = []
    while isinstance(job := studies.take(), Job):
        found.append(job)
        studies.tell(job, value(job), TrialState.COMPLETE)
    assert job is None
    return found


def test_rates_are_tuned_before_seeds_which_no_tuning_run_has(tmp_path):
    jobs = all_jobs(begun(tmp_path), lambda job: -abs(math.log10(job.values["lr"] / 1e-3)))
    kinds = [job.kind for job in jobs]
    assert kinds == ["tune"] * 15 + ["final"] * 9
    assert {job.seed for job in jobs if job.kind == "tune"} == {TUNING_SEED}
    finals = [(job.seed, job.arm) for job in jobs if job.kind == "final"]
    assert finals == [(seed, arm) for seed in range(3) for arm in ("first", "better", "same")]
    assert all(job.values == {"lr": 1e-3} for job in jobs if job.kind == "final")


def test_without_tuning_each_arm_has_its_own_rate(tmp_path):
    jobs = all_jobs(begun(tmp_path, tune_rate=False, seeds=1))
    assert [(job.kind, job.values) for job in jobs] == [("final", {"lr": 1e-3})] * 3


def test_further_settings_are_searched_around_the_best_rate(tmp_path):
    studies = begun(tmp_path, searched={"model.method.alpha": "8..64:log"}, searches=4)
    jobs = all_jobs(studies, lambda job: job.values.get("model.method.alpha", 0) - abs(math.log10(job.values["lr"])))
    searched = [job for job in jobs if job.kind == "tune" and job.arm == "first" and len(job.values) == 2]
    assert len(searched) == 4
    assert all(8 <= job.values["model.method.alpha"] <= 64 for job in searched)
    best = max(searched, key=lambda job: job.values["model.method.alpha"] - abs(math.log10(job.values["lr"])))
    assert studies.best(studies.plan.arms[0]) == best.values


def test_two_processes_never_take_the_same_run_and_wait_for_one_another(tmp_path):
    one = begun(tmp_path, tune_rate=False, seeds=1)
    two = Studies(tmp_path, one.plan)
    jobs = [one.take(), two.take(), one.take()]
    assert len({job.folder for job in jobs}) == 3
    assert two.take() == "wait"
    for studies, job in zip((one, two, one), jobs, strict=True):
        studies.tell(job, 0.5, TrialState.COMPLETE)
    assert two.take() is None
    assert one.is_finished()


def test_a_run_whose_process_has_died_is_taken_again(tmp_path):
    dead = begun(tmp_path, tune_rate=False, seeds=1)
    job = dead.take()
    alive = Studies(tmp_path, dead.plan)
    assert alive.take().folder != job.folder
    dead.release(job)  # as the system does with the lock of a process that has died
    assert alive.take() == job


def test_a_run_that_failed_is_an_entry_and_not_the_end(tmp_path):
    studies = begun(tmp_path, tune_rate=False, seeds=1)
    job = studies.take()
    studies.tell(job, math.nan, TrialState.FAIL, "out of memory")
    assert len(all_jobs(studies)) == 2
    (failed,) = studies.done(job.arm, "final")
    assert (failed.state, failed.reason) == ("failed", "out of memory")


def test_a_value_that_is_no_number_is_a_failure(tmp_path):
    studies = begun(tmp_path, tune_rate=False, seeds=1)
    job = studies.take()
    studies.tell(job, math.nan, TrialState.COMPLETE)
    assert studies.done(job.arm, "final")[0].state == "failed"


def test_rates_that_others_were_better_than_are_pruned(tmp_path):
    studies = begun(tmp_path)
    for _ in range(3):
        job = studies.take()
        assert not studies.report(job, 10, 0.9)
        assert not studies.report(job, 20, 0.9)
        studies.tell(job, 0.9, TrialState.COMPLETE)
    job = studies.take()
    studies.report(job, 10, 0.1)
    assert studies.report(job, 20, 0.1)
    studies.tell(job, math.nan, TrialState.PRUNED, "others were better")
    assert studies.done(job.arm, "tune")[-1].state == "pruned"


def test_a_seed_more_for_each_arm(tmp_path):
    studies = begun(tmp_path, tune_rate=False, seeds=1)
    all_jobs(studies)
    studies.add_seed()
    assert [job.seed for job in all_jobs(studies)] == [1, 1, 1]


def test_time_is_measured_first(tmp_path):
    jobs = all_jobs(begun(tmp_path, same_time=True, tune_rate=False, seeds=1))
    assert [job.kind for job in jobs] == ["time"] * 3 + ["final"] * 3


def test_a_database_knows_the_folder(tmp_path):
    storage = f"sqlite:///{tmp_path / 'studies.db'}"
    folder = tmp_path / "003"
    folder.mkdir()
    all_jobs(begun(folder, tune_rate=False, seeds=1, storage=storage))
    assert folder_in(storage) == folder
    with pytest.raises(RunFolderError, match=r"no comparison has begun there"):
        folder_in(f"sqlite:///{tmp_path / 'empty.db'}")


@pytest.mark.slow
@pytest.mark.skipif("COMPARE_TEST_DATABASE" not in os.environ, reason="no database server: set COMPARE_TEST_DATABASE")
def test_a_database_server_shares_the_runs(tmp_path):
    """Two processes, one of which dies with a run in hand."""
    storage, folder = os.environ["COMPARE_TEST_DATABASE"], tmp_path / uuid.uuid4().hex
    folder.mkdir()
    one = begun(folder, tune_rate=False, seeds=1, storage=storage)
    lost = one.take()
    code = (
        "import sys, test_studies; from pathlib import Path; test_studies.join(Path(sys.argv[1]), float(sys.argv[2]))"
    )
    words = [sys.executable, "-c", code, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    both = [subprocess.Popen([*words, value], env=environment) for value in ("0.25", "0.75")]
    one.release(lost)  # as the system does with the lock of a process that has died
    assert [process.wait(120) for process in both] == [0, 0]
    values = [done.value for planned in one.plan.arms for done in one.done(planned.arm.name, "final")]
    assert len(values) == 3
    assert set(values) <= {0.25, 0.75}
    assert one.is_finished()
    assert folder_in(storage) == folder


def join(folder: Path, value: float) -> None:
    """Take runs until none is left; each comes out with one value."""
    studies = Studies(folder, Plan.read(folder))
    while (job := studies.take()) is not None:
        if isinstance(job, Job):
            studies.tell(job, value, TrialState.COMPLETE)
        else:
            threading.Event().wait(0.2)


@pytest.mark.parametrize("text", ["8", "8..64:linear", "a..b", "64..8"])
def test_spaces_that_cannot_be_read(text):
    with pytest.raises(SettingsError, match=r"is no space; write LOW\.\.HIGH"):
        check_spaces({"model.method.alpha": text})


def test_a_storage_that_cannot_be_opened():
    with pytest.raises(SettingsError, match=r'--storage is "nosuch://here"; it cannot be opened'):
        open_storage("nosuch://here")
