"""What a comparison has found: of each arm its runs, what they cost, and how they compare with another arm's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_lightning.callbacks.forgetting import FILENAME, Course, read_course
from lora_lightning.cli.compare import search, statistics
from lora_lightning.cli.compare.child import BESIDE
from lora_lightning.cli.compare.measured import MEASURED, ROWS
from lora_lightning.cli.compare.plan import Plan, PlannedArm
from lora_lightning.cli.compare.statistics import Difference
from lora_lightning.cli.compare.studies import Done, Studies
from lora_lightning.cli.compare.worker import read_points
from lora_lightning.errors import DataError


@dataclass(frozen=True)
class FinalRun:
    """A final run that came out."""

    seed: int
    folder: Path
    value: float
    cost: dict[str, Any]
    summary: dict[str, Any]
    rows: tuple[Any, Any] | None
    """Sums and counts of validation rows."""
    curve: list[dict[str, Any]]
    beside: Course | None
    """What it forgot or carried over, of the data of `--also`."""


@dataclass(frozen=True)
class ArmOutcome:
    """What an arm has come to."""

    planned: PlannedArm
    finals: list[FinalRun]
    failures: list[Done]
    tuning: list[Done]
    best: dict[str, Any]
    on_edge: bool
    """Whether its best rate is the lowest or the highest that was tried."""
    difference: Difference | None
    """To the arm `against`; None for the first arm, and where runs are too few."""
    against: str
    """The arm that it is compared with: the first one, unless it names another; empty for the first one itself."""

    @property
    def name(self) -> str:
        """The arm's."""
        return self.planned.arm.name

    @property
    def values(self) -> list[float]:
        """The metric of each seed."""
        return [run.value for run in self.finals]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds, of a sample."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    def cost(self, name: str) -> float:
        """The mean of a number that was measured of each final run."""
        found = [run.cost[name] for run in self.finals if run.cost.get(name) is not None]
        return float(np.mean(found)) if found else math.nan

    def forgetting(self, metric: str) -> list[float]:
        """Change of a metric on the other data from before training to its end, by seed."""
        changes = [run.beside.changes(BESIDE, metric) for run in self.finals if run.beside is not None]
        return [change[-1][1] for change in changes if change]

    @property
    def best_run(self) -> FinalRun | None:
        """The final run with the best value."""
        if not self.finals:
            return None
        sign = -1 if self.planned.facts.higher_is_better else 1
        return min(self.finals, key=lambda run: sign * run.value)

    @property
    def file_bytes(self) -> int:
        """Size of the adapter's file."""
        run = self.best_run
        path = run.folder / "adapter" / "adapter.safetensors" if run else None
        return path.stat().st_size if path is not None and path.is_file() else 0


def outcomes(folder: Path, plan: Plan, studies: Studies | None = None) -> list[ArmOutcome]:
    """All arms, as far as they have come; differences are corrected for their number."""
    studies = studies or Studies(folder, plan)
    finals = {one.arm.name: _finals(studies.done(one.arm.name, "final")) for one in plan.arms}
    made = {name: tables(runs) for name, runs in finals.items()}
    pairs = {name: (made[other], made[name]) for name, other in plan.pairs.items()}
    compared = statistics.compare(pairs, plan.higher_is_better)
    found = []
    for one in plan.arms:
        name = one.arm.name
        ended = studies.done(name, "final")
        found.append(
            ArmOutcome(
                planned=one,
                finals=finals[name],
                failures=[done for done in ended if done.state != "complete"],
                tuning=studies.done(name, "tune"),
                best=studies.best(one),
                on_edge=plan.tune_rate and search.is_edge(studies.rates(name), plan.higher_is_better),
                difference=compared.get(name),
                against=plan.pairs.get(name, ""),
            )
        )
    return found


def _finals(ended: Sequence[Done]) -> list[FinalRun]:
    return [_final(done) for done in ended if done.state == "complete"]


def _final(done: Done) -> FinalRun:
    folder = done.job.folder
    rows = None
    with suppress(OSError, ValueError, KeyError), np.load(folder / ROWS, allow_pickle=False) as read:
        rows = (read["sums"].astype(np.float64), read["counts"].astype(np.float64))
    return FinalRun(
        seed=done.job.seed,
        folder=folder,
        value=done.value,
        cost=_read(folder / MEASURED),
        summary=_read(folder / "summary.json"),
        rows=rows,
        curve=read_points(folder),
        beside=_course(folder / FILENAME),
    )


def _course(file: Path) -> Course | None:
    with suppress(DataError):
        return read_course(file)
    return None


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return read
    return {}


def tables(runs: Sequence[FinalRun]) -> statistics.Runs:
    """Values by seed, and rows by seed where all runs have the same ones."""
    values = {run.seed: run.value for run in runs}
    rows = {run.seed: run.rows for run in runs if run.rows is not None}
    counts = [counts for _, counts in rows.values()]
    same = len(rows) == len(values) and all(np.array_equal(counts[0], other) for other in counts[1:])
    return statistics.Runs(values, rows if same else {})
