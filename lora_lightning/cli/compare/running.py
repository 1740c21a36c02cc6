"""A comparison from its plan to its report: workers side by side, progress, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_lightning.cli.compare import html, recommendation, results, table
from lora_lightning.cli.compare.measured import MEASURED
from lora_lightning.cli.compare.outcomes import ArmOutcome, outcomes
from lora_lightning.cli.compare.pictures import draw
from lora_lightning.cli.compare.plan import Plan, PlannedArm
from lora_lightning.cli.compare.studies import Studies
from lora_lightning.cli.compare.worker import Worker
from lora_lightning.errors import SettingsError
from lora_lightning.storage.atomic import write_atomically

USUAL = 5
"""Rates that tuning an arm usually takes."""


@dataclass(frozen=True)
class Progress:
    """How far a comparison has come."""

    ended: int
    running: int
    expected: int
    seconds: float
    """That runs took on average; not a number before one has ended."""

    def line(self, jobs: int = 1) -> str:
        """For people."""
        left = max(self.expected - self.ended, 0)
        rest = "" if math.isnan(self.seconds) else f", about {_duration(left * self.seconds / max(jobs, 1))} left"
        return f"{self.ended} of about {self.expected} runs have ended, {self.running} at work{rest if left else ''}"


def progress(plan: Plan, studies: Studies) -> Progress:
    """Count runs; how many tuning takes is known only when it ends."""
    ended, running, expected, seconds = 0, 0, 0, []
    for one in plan.arms:
        for kind in ("time", "tune", "final"):
            done = studies.done(one.arm.name, kind)
            ended += len(done)
            running += len(studies.running(one.arm.name, kind))
            for each in done:
                with contextlib.suppress(OSError, ValueError, KeyError):
                    seconds.append(json.loads((each.job.folder / MEASURED).read_text())["seconds"])
            expected += _expected(plan, studies, one, kind, len(done))
    return Progress(ended, running, expected, statistics.fmean(seconds) if seconds else math.nan)


def _expected(plan: Plan, studies: Studies, planned: PlannedArm, kind: str, done: int) -> int:
    if kind == "time":
        return int(plan.same_time)
    if kind == "final":
        return max(studies.seeds(), done)
    if not plan.tune_rate:
        return 0
    more = plan.searches if plan.searched else 0
    if not studies.next_rates(planned):
        return max(done, len(studies.rates(planned.arm.name)) + more)
    return max(USUAL, done + 1) + more


def run_all(folder: Path, plan: Plan, jobs: int, hours: float | None) -> str:
    """Run what is left; returns why it stopped before the end, or nothing.

    Raises:
        SettingsError: fewer than one job.
    """
    if jobs < 1:
        raise SettingsError(f"--jobs is {jobs}; it must be at least 1.")
    until = math.inf if hours is None else time.monotonic() + 3600 * hours
    if jobs > 1:  # each run takes its part of the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    studies, printing = Studies(folder, plan), threading.Lock()

    def tell(line: str) -> None:
        with printing:
            print(line, flush=True)

    def after() -> None:
        with printing:
            print(f"  {progress(plan, studies).line(jobs)}", flush=True)
            write_reports(folder, plan)

    while True:
        stopped = _together([Worker(folder, plan, tell, until) for _ in range(jobs)], after)
        if stopped:
            return stopped
        if time.monotonic() >= until:
            return "" if studies.is_finished() else f"--hours {hours:g} are over"
        if not _needs_seed(folder, plan, studies):
            return ""
        studies.add_seed()


def _together(workers: Sequence[Worker], after: Callable[[], object]) -> str:
    """Run workers in threads, until they end or Ctrl-C stops them."""
    failed: list[BaseException] = []

    def work(worker: Worker) -> None:
        try:
            worker.work(after)
        except BaseException as error:  # told in the thread that waits
            failed.append(error)
            for other in workers:
                other.stop.set()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    stopped = ""
    while any(thread.is_alive() for thread in threads):
        try:
            for thread in threads:
                thread.join(0.2)
        except KeyboardInterrupt:
            print("stopping; runs write their checkpoints ...", flush=True)
            stopped = "stopped by Ctrl-C"
            for worker in workers:
                worker.stop.set()
    if failed:
        raise failed[0]
    return stopped


def _needs_seed(folder: Path, plan: Plan, studies: Studies) -> bool:
    """Whether `--until` asks for another seed."""
    if plan.until is None:
        return False
    found = outcomes(folder, plan, studies)
    reference = abs(found[0].mean) if not 0 <= found[0].mean <= 1 else 1.0
    widths = [(d.high - d.low) / 2 for one in found if (d := one.difference) is not None]
    return not widths or max(widths) > plan.until * reference


def write_reports(folder: Path, plan: Plan) -> list[ArmOutcome]:
    """Write table, numbers, page and picture, as far as there is anything."""
    found = outcomes(folder, plan)
    markdown = table.markdown(plan, found)
    texts = {
        "table.md": markdown + "\n",
        "results.json": json.dumps(results.results(folder, plan, found), indent=1) + "\n",
        "report.html": html.page(folder, plan, found),
    }
    for name, text in texts.items():
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    draw(folder / "report.png", plan, found)
    return found


def finish(folder: Path, plan: Plan, recommend: bool) -> str:
    """Write everything a last time; what to print."""
    found = write_reports(folder, plan)
    lines = ["", table.text(plan, found), "", *table.sentences(plan, found), f"report: {folder / 'report.html'}"]
    if recommend:
        lines += ["", recommendation.recommend(folder, plan, found)]
    return "\n".join(lines)


def status(folder: Path) -> str:
    """How far a comparison has come, and what it has found so far."""
    plan = Plan.read(folder)
    studies = Studies(folder, plan)
    found = outcomes(folder, plan, studies)
    return "\n".join([progress(plan, studies).line(), "", table.text(plan, found)])


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{max(minutes, 1)} min"
