"""A worker: takes runs of a comparison one by one, each in a process of its own with bounds, until none is left."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from optuna.trial import TrialState

from lora_lightning.cli.compare.child import Spec
from lora_lightning.cli.compare.measured import MEASURED, POINTS
from lora_lightning.cli.compare.plan import Plan, rate_words, seed_words
from lora_lightning.cli.compare.studies import LOCK, RATE, Job, Studies

TIMED_STEPS = 30
"""Optimizer steps of a run that only says how long one takes."""
LOOKS = 0.5
"""Seconds between two looks at a run."""
LOG = "log.txt"


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    state: TrialState
    value: float
    reason: str = ""


class Worker:
    """Runs what the studies hand out.

    Args:
        folder: of the comparison.
        plan: what it does.
        tell: is given a line for what happens.
        until: `time.monotonic()` after which nothing is begun.
    """

    def __init__(self, folder: Path, plan: Plan, tell: Callable[[str], object], until: float = math.inf) -> None:
        self.folder, self.plan, self.tell, self.until = folder, plan, tell, until
        self.studies = Studies(folder, plan)
        self.stop = threading.Event()

    def work(self, after: Callable[[], object] = lambda: None) -> None:
        """Until nothing is left, time is up, or `stop` is set.

        Args:
            after: is called after each run.
        """
        while not self.stop.is_set() and time.monotonic() < self.until:
            job = self.studies.take()
            if job is None:
                return
            if job == "wait":
                self.stop.wait(1.0)
                continue
            assert isinstance(job, Job)
            ended = self.run(job)
            if ended is None:  # cut: what it has reached is kept
                self.studies.release(job)
                return
            self.studies.tell(job, ended.value, ended.state, ended.reason)
            self.tell(_line(job, ended, self.plan.metric))
            after()

    def run(self, job: Job) -> Ended | None:
        """Run a job to its end, or on from where it was cut; None where this worker was stopped."""
        if not (job.folder / "last.ckpt").is_file() or (job.folder / "summary.json").is_file():
            _empty(job.folder)  # nothing to go on from, or killed between its end and what is measured after it
            self._spec(job).write(job.folder)
        with (job.folder / LOG).open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "lora_lightning.cli.compare.child", str(job.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                start_new_session=True,
            )
            ended = self._watch(job, process)
        if ended is not None and job.kind != "final":  # what was learned is of no use, and large
            (job.folder / "last.ckpt").unlink(missing_ok=True)
            shutil.rmtree(job.folder / "adapter", ignore_errors=True)
        return ended

    def _spec(self, job: Job) -> Spec:
        planned = self.plan.arm(job.arm)
        words = [*planned.words, *rate_words(planned, job.values[RATE]), *seed_words(planned, job.seed)]
        for name, value in job.values.items():
            if name != RATE:
                words += [f"--{name}", json.dumps(value)]
        if job.kind == "time":
            words += ["--trainer.max_steps", str(TIMED_STEPS), "--trainer.limit_val_batches", "1"]
        elif self.plan.same_time:
            words += self._steps_for_time(job.arm)
        return Spec(
            words=words,
            hold_out=0.0 if job.kind == "final" else self.plan.fraction,
            keep_rows=job.kind == "final",
            also=list(self.plan.also) if job.kind == "final" else [],
        )

    def _steps_for_time(self, arm: str) -> list[str]:
        """Steps that take an arm as long as the steps of the arm that it is compared with take that one."""
        reference = self.plan.reference(arm)
        mine, theirs = (self._step_seconds(name) for name in (arm, reference.arm.name))
        steps = given_steps(reference.words)
        if not (mine and theirs and steps):
            return []
        return ["--trainer.max_steps", str(max(1, round(steps * theirs / mine))), "--trainer.max_epochs", "-1"]

    def _step_seconds(self, arm: str) -> float | None:
        for done in self.studies.done(arm, "time"):
            with suppress(OSError, ValueError):
                seconds: float | None = json.loads((done.job.folder / MEASURED).read_text())["step_seconds"]
                return seconds
        return None

    # -- watching ------------------------------------------------------------------------------------------------------

    def _watch(self, job: Job, process: subprocess.Popen[bytes]) -> Ended | None:
        began, told = time.monotonic(), 0
        while (code := _code(process, LOOKS)) is None:
            if self.stop.is_set():
                _end(process)
                return None
            points = read_points(job.folder)
            for point in points[told:]:
                value = point["values"].get(self.plan.metric, math.nan)
                if self.studies.report(job, point["step"], value):
                    _end(process)
                    return Ended(TrialState.PRUNED, value, f"others were better at step {point['step']}")
            told = len(points)
            if (why := self._over(process, began)) is not None:
                _end(process)
                return Ended(TrialState.FAIL, math.nan, why)
        if code != 0:
            return Ended(TrialState.FAIL, math.nan, _last_words(job.folder, code))
        return Ended(TrialState.COMPLETE, self._value(job))

    def _over(self, process: subprocess.Popen[bytes], began: float) -> str | None:
        """Which bound a run is over."""
        if self.plan.minutes is not None and time.monotonic() - began > 60 * self.plan.minutes:
            return f"stopped after {self.plan.minutes:g} minutes (--minutes)"
        if self.plan.memory_gib is not None:
            with suppress(psutil.Error):
                top = psutil.Process(process.pid)
                used = sum(one.memory_info().rss for one in (top, *top.children(recursive=True)))
                if used > self.plan.memory_gib * 2**30:
                    return f"stopped at {used / 2**30:.1f} GiB of memory (--memory {self.plan.memory_gib:g})"
        return None

    def _value(self, job: Job) -> float:
        """The metric of the state that was saved."""
        try:
            summary = json.loads((job.folder / "summary.json").read_text(encoding="utf-8"))
            return float(summary["values"].get(self.plan.metric, math.nan))
        except (OSError, ValueError, KeyError):
            return math.nan


def read_points(folder: Path) -> list[dict[str, Any]]:
    """Validations of a run so far; a line that is still being written is left out."""
    path = folder / POINTS
    found: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def given_steps(words: tuple[str, ...]) -> int | None:
    """Optimizer steps that a command line asks for, by number."""
    from lora_lightning.cli import former_names
    from lora_lightning.cli.command_line import read
    from lora_lightning.cli.given_settings import given_settings

    steps = given_settings(read(words).rest, former_names.load).get("trainer.max_steps")
    return steps if isinstance(steps, int) and steps > 0 else None


def _line(job: Job, ended: Ended, metric: str) -> str:
    settings = ", ".join(f"{name.rpartition('.')[2]} {value:.4g}" for name, value in job.values.items())
    what = {"time": "timed", "tune": f"tuning, {settings}", "final": f"seed {job.seed}, {settings}"}[job.kind]
    if ended.state == TrialState.COMPLETE:
        return f"{job.arm}: {what}: {metric} {ended.value:.4f}"
    return f"{job.arm}: {what}: {'pruned' if ended.state == TrialState.PRUNED else 'failed'}, {ended.reason}"


def _code(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a run to stop, which writes a checkpoint, and make it where it does not."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    if _code(process, 30) is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _die_with_parent() -> None:
    """Have Linux kill this process when the worker dies, which then frees the run."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _last_words(folder: Path, code: int) -> str:
    """Why a process failed, in its own words."""
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {lines[-1]}" if lines else how


def _empty(folder: Path) -> None:
    """Remove what an earlier process has left of a run that cannot go on."""
    for path in folder.iterdir():
        if path.name not in (LOCK, LOG):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
