from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import comparisons
import pytest
from optuna.trial import TrialState
from toy_comparison import words

from lora_lightning.cli.compare.arms import Arm
from lora_lightning.cli.compare.outcomes import outcomes
from lora_lightning.cli.compare.plan import Plan, planned_arms
from lora_lightning.cli.compare.studies import Job, Studies
from lora_lightning.cli.compare.worker import Worker, given_steps, read_points

COMPARE = [sys.executable, "-m", "lora_lightning", "compare"]


def planned(folder: Path, **changed) -> Plan:
    """Two arms without tuning, one seed each."""
    arms = planned_arms(words(folder), [Arm("LoRA"), Arm("linear", {"model.targets": "none"})], None, lambda _: None)
    plan = comparisons.plan(**{"arms": arms, "seeds": 1, "tune_rate": False, **changed})
    (folder / "001").mkdir()
    plan.write(folder / "001")
    return plan


def test_a_command_line_says_its_steps(tmp_path):
    assert given_steps((*words(tmp_path, steps=8),)) == 8
    assert given_steps(("--data.limit", "3")) is None


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    (tmp_path / "points.jsonl").write_text('{"step": 1, "values": {}}\n{"step": 2, "val')
    assert [point["step"] for point in read_points(tmp_path)] == [1]
    assert read_points(tmp_path / "none") == []


@pytest.mark.slow
def test_runs_are_processes_and_one_that_fails_is_an_entry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = planned(tmp_path)
    broken = replace(plan.arms[1], words=(*plan.arms[1].words, "--data.train", "nowhere.csv"))
    plan = replace(plan, arms=(plan.arms[0], broken))
    told: list[str] = []
    Worker(tmp_path / "001", plan, told.append).work()
    lora, linear = outcomes(tmp_path / "001", plan)
    assert lora.values[0] > 0
    assert lora.finals[0].rows is not None
    assert (lora.finals[0].folder / "adapter" / "adapter.safetensors").is_file()
    assert linear.finals == []
    assert 'LabelledText.train is "nowhere.csv"' in linear.failures[0].reason
    assert told[1].startswith("linear: seed 0, lr 0.001: failed, LabelledText.train")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bound", "said"),
    [({"minutes": 0.01}, "stopped after 0.01 minutes (--minutes)"), ({"memory_gib": 0.01}, "GiB of memory (--memory")],
)  # fmt: skip
def test_a_run_over_its_bound_is_stopped(tmp_path, monkeypatch, bound, said):
    monkeypatch.chdir(tmp_path)
    plan = planned(tmp_path, **bound)
    worker = Worker(tmp_path / "001", plan, print)
    job = worker.studies.take()
    assert isinstance(job, Job)
    ended = worker.run(job)
    assert ended.state == TrialState.FAIL
    assert said in ended.reason
    assert math.isnan(ended.value)


@pytest.mark.slow
def test_killed_anywhere_and_started_again_nothing_is_run_twice(tmp_path):
    """Killed with its first run in its midst; the second call goes on with that run from its checkpoint."""
    plan = planned(tmp_path)
    plan = replace(plan, arms=tuple(replace(one, words=(*one.words, *SLOWLY)) for one in plan.arms))
    plan.write(tmp_path / "001")
    process = subprocess.Popen([*COMPARE, "--resume", "001"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    run = tmp_path / "001" / "runs" / "LoRA" / "final-000"
    wait_for(lambda: (run / "last.ckpt").is_file() and len(read_points(run)) >= 2)
    process.kill()
    process.wait(30)
    wait_for(lambda: not alive(run))
    assert not (run / "measured.json").exists()
    done = subprocess.run([*COMPARE, "--resume", "001"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    log = (run / "log.txt").read_text()
    assert log.count("LoRA: ") >= 1
    steps = [point["step"] for point in read_points(run)]
    assert steps[-1] == 80
    assert json.loads((run / "measured.json").read_text())["steps"] == 80
    again = {step for step in steps if steps.count(step) > 1}
    assert len(again) <= 2, "the run began anew"
    assert sorted(path.name for path in run.parent.iterdir()) == ["final-000"]
    third = subprocess.run([*COMPARE, "--resume", "001"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "seed 0" not in third.stdout


SLOWLY = ("--trainer.max_steps", "80", "--trainer.val_check_interval", "4", "--trainer.max_epochs", "-1")


@pytest.mark.slow
def test_two_joined_processes_share_the_runs_and_one_that_is_killed_leaves_its_own(tmp_path):
    plan = planned(tmp_path, seeds=2)
    first = subprocess.Popen([*COMPARE, "--resume", "001"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    folders = tmp_path / "001" / "runs"
    wait_for(lambda: len(list(folders.glob("*/*/job.json"))) >= 1)
    words = [*COMPARE, "--join", "001/journal.log"]
    second = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: len(list(folders.glob("*/*/job.json"))) >= 2)
    first.send_signal(signal.SIGKILL)
    first.wait(30)
    text, _ = second.communicate(timeout=300)
    assert second.returncode == 0, text
    found = outcomes(tmp_path / "001", plan)
    assert [len(one.finals) for one in found] == [2, 2]
    assert Studies(tmp_path / "001", plan).is_finished()
    assert sorted(path.name for path in folders.glob("*/*")) == sorted(["final-000", "final-001"] * 2)


def alive(run: Path) -> bool:
    """Whether a process is at work in a run's folder."""
    try:
        os.kill(json.loads((run / ".lock").read_text())["pid"], 0)
    except (OSError, ValueError, KeyError):
        return False
    return True


def wait_for(what, seconds: float = 200) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.1)
