"""Who does what next: the runs of a comparison as trials of Optuna, taken by any number of processes.

Each arm has a study of tuning runs and one of final runs. Processes agree by a lock on the comparison's folder, which
all of them share; each run's folder has a lock of its own, which is free once its process has died.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState

from lora_lightning.cli.compare import search
from lora_lightning.cli.compare.plan import TUNING_SEED, Plan, PlannedArm
from lora_lightning.cli.run_folder import Lock
from lora_lightning.errors import RunFolderError, SettingsError

Kind = Literal["time", "tune", "final"]
JOURNAL = "journal.log"
LOCK = ".compare.lock"
RATE = "lr"
FOLDER = "folder"
"""Attribute of a study: the comparison's folder."""
_RATES = FloatDistribution(1e-9, 1e3, log=True)
_PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "median": lambda: MedianPruner(n_startup_trials=3, n_warmup_steps=1),
    "halving": SuccessiveHalvingPruner,
    "none": NopPruner,
}
PRUNERS = tuple(_PRUNERS)


@dataclass(frozen=True)
class Job:
    """A run that was taken."""

    arm: str
    kind: Kind
    number: int
    """Of the trial in its study."""
    seed: int
    values: dict[str, Any]
    """Tuned settings: `lr`, and others by dotted name."""
    folder: Path


@dataclass(frozen=True)
class Done:
    """A run that has ended."""

    job: Job
    value: float
    """Of the metric; not a number where there is none."""
    state: Literal["complete", "pruned", "failed"]
    reason: str


class Studies:
    """The trials of a comparison.

    Args:
        folder: of the comparison.
        plan: what it does.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = open_storage(plan.storage or str(folder / JOURNAL))
        self._held: dict[Path, Lock] = {}
        self._studies: dict[tuple[str, Kind], optuna.Study] = {}

    # -- taking and telling --------------------------------------------------------------------------------------------

    def take(self) -> Job | Literal["wait"] | None:
        """The next run, which is then this process's; "wait" while other runs decide it; None at the end."""
        with self._locked():
            waiting = False
            for choose in (self._orphan, self._untimed, self._untuned, self._unseeded):
                answers = []
                for planned in self.plan.arms:
                    found = choose(planned)
                    if isinstance(found, Job):
                        return found
                    answers.append(found)
                waiting = waiting or "wait" in answers
                if choose == self._untimed and "wait" in answers:  # all others need to know how long a step takes
                    break
            return "wait" if waiting else None

    def tell(self, job: Job, value: float, state: TrialState, reason: str = "") -> None:
        """Say how a run has ended, and let go of it."""
        study = self.study(job.arm, job.kind)
        trial = optuna.trial.Trial(study, study.trials[job.number]._trial_id)
        with self._locked():
            trial.set_user_attr("reason", reason)
            if state == TrialState.PRUNED or (state == TrialState.COMPLETE and not math.isnan(value)):
                study.tell(trial, None if state == TrialState.PRUNED else value, state=state)
            else:
                study.tell(trial, state=TrialState.FAIL)
        self.release(job)

    def is_finished(self) -> bool:
        """Whether every run that is asked for has ended."""
        kinds: tuple[Kind, ...] = ("tune", "final")
        if any(self.running(one.arm.name, kind) for one in self.plan.arms for kind in kinds):
            return False
        return all(len(self.study(one.arm.name, "final").trials) >= self.seeds() for one in self.plan.arms)

    def release(self, job: Job) -> None:
        """Let go of a run that was cut: another process, or this one later, goes on with it."""
        if (lock := self._held.pop(job.folder, None)) is not None:
            lock.release()

    def report(self, job: Job, step: int, value: float) -> bool:
        """Tell a value of a tuning run in mid-run; whether it is to be ended, since others were better by then."""
        study = self.study(job.arm, job.kind)
        trial = optuna.trial.Trial(study, study.trials[job.number]._trial_id)
        trial.report(value, step)
        return job.kind == "tune" and trial.should_prune()

    # -- what there is -------------------------------------------------------------------------------------------------

    def study(self, arm: str, kind: Kind) -> optuna.Study:
        """The study of an arm's runs of a kind."""
        if (known := self._studies.get((arm, kind))) is not None:
            return known
        direction: Literal["maximize", "minimize"] = "maximize" if self.plan.higher_is_better else "minimize"
        study = optuna.create_study(
            study_name=f"{self.folder.name}: {arm}: {kind}",
            storage=self.storage,
            direction=direction,
            load_if_exists=True,
            sampler=TPESampler(seed=TUNING_SEED, n_startup_trials=5, multivariate=True),
            pruner=_PRUNERS[self.plan.pruner](),
        )
        if self.plan.storage and FOLDER not in study.user_attrs:
            study.set_user_attr(FOLDER, str(self.folder.absolute()))
        self._studies[arm, kind] = study
        return study

    def done(self, arm: str, kind: Kind) -> list[Done]:
        """Runs of an arm that have ended, in their order."""
        states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
        found = []
        for trial in self.study(arm, kind).trials:
            if trial.state in states:
                value = trial.value if trial.value is not None else math.nan
                reason = trial.user_attrs.get("reason", "")
                found.append(Done(self._job(arm, kind, trial), value, states[trial.state], reason))  # type: ignore[arg-type]
        return found

    def running(self, arm: str, kind: Kind) -> list[Job]:
        """Runs of an arm that were taken and have not ended."""
        trials = self.study(arm, kind).get_trials(states=(TrialState.RUNNING,))
        return [self._job(arm, kind, trial) for trial in trials]

    def best(self, planned: PlannedArm) -> dict[str, Any]:
        """The tuned settings of an arm; its own rate where nothing is tuned, or no tuning run came out."""
        complete = [done for done in self.done(planned.arm.name, "tune") if done.state == "complete"]
        if not complete:
            return {RATE: planned.facts.rate}
        sign = -1 if self.plan.higher_is_better else 1
        return min(complete, key=lambda done: (sign * done.value, done.job.values[RATE])).job.values

    def rates(self, arm: str) -> dict[float, float]:
        """Values by rate of the runs that tried rates alone."""
        return {
            done.job.values[RATE]: done.value if done.state != "failed" else math.nan
            for done in self.done(arm, "tune")
            if set(done.job.values) == {RATE}
        }

    def next_rates(self, planned: PlannedArm) -> list[float]:
        """Rates that are to be tried next; none where the search of an arm has ended."""
        start = search.rounded(planned.facts.rate)
        return search.next_rates(start, self.rates(planned.arm.name), self.plan.higher_is_better)

    # -- the order of things -------------------------------------------------------------------------------------------

    def _orphan(self, planned: PlannedArm) -> Job | Literal["wait"] | None:
        """A run whose process has died."""
        waiting = False
        for kind in ("time", "tune", "final"):
            for job in self.running(planned.arm.name, kind):
                if self._hold(job.folder):
                    return job
                waiting = True
        return "wait" if waiting else None

    def _untimed(self, planned: PlannedArm) -> Job | Literal["wait"] | None:
        if not self.plan.same_time:
            return None
        if self.study(planned.arm.name, "time").trials:
            return "wait" if self.running(planned.arm.name, "time") else None
        return self._ask(planned, "time", TUNING_SEED, {RATE: planned.facts.rate})

    def _untuned(self, planned: PlannedArm) -> Job | Literal["wait"] | None:
        """A rate that the search asks for, or then other settings."""
        if not self.plan.tune_rate:
            return None
        name, study = planned.arm.name, self.study(planned.arm.name, "tune")
        taken = {trial.params[RATE] for trial in study.trials}
        wanted = self.next_rates(planned)
        for rate in wanted:
            if rate not in taken:
                return self._ask(planned, "tune", TUNING_SEED, {RATE: rate})
        if wanted:
            return "wait"
        searched = [trial for trial in study.trials if len(trial.params) > 1]
        if self.plan.searched and len(searched) < self.plan.searches:
            return self._ask(planned, "tune", TUNING_SEED, None)
        return "wait" if self.running(name, "tune") else None

    def _unseeded(self, planned: PlannedArm) -> Job | Literal["wait"] | None:
        """The next seed of an arm that is tuned."""
        name = planned.arm.name
        if self.plan.tune_rate and (self.running(name, "tune") or self.next_rates(planned)):
            return "wait"
        there = len(self.study(name, "final").trials)
        fewest = min(len(self.study(one.arm.name, "final").trials) for one in self.plan.arms)
        if there >= self.seeds() or there > fewest:
            return None
        return self._ask(planned, "final", there, self.best(planned))

    def seeds(self) -> int:
        """Final runs that each arm is to have."""
        extra = self.study(self.plan.arms[0].arm.name, "final").user_attrs.get("extra_seeds", 0)
        return self.plan.seeds + int(extra)

    def add_seed(self) -> None:
        """Give each arm one more final run."""
        study = self.study(self.plan.arms[0].arm.name, "final")
        with self._locked():
            study.set_user_attr("extra_seeds", self.seeds() - self.plan.seeds + 1)

    def _ask(self, planned: PlannedArm, kind: Kind, seed: int, values: dict[str, Any] | None) -> Job:
        """A new trial; without values, Optuna chooses them."""
        study = self.study(planned.arm.name, kind)
        spaces = {name: _space(text) for name, text in self.plan.searched.items()}
        if values is not None:
            study.enqueue_trial(values)
            given = {name: space for name, space in spaces.items() if name in values}
            trial = study.ask({RATE: _RATES, **given})
        else:
            best = self.best(planned)[RATE]
            trial = study.ask({RATE: FloatDistribution(best / search.COARSE, best * search.COARSE, log=True), **spaces})
        trial.set_user_attr("seed", seed)
        job = self._job(planned.arm.name, kind, study.trials[trial.number])
        job.folder.mkdir(parents=True, exist_ok=True)
        self._hold(job.folder)
        return job

    def _job(self, arm: str, kind: Kind, trial: FrozenTrial) -> Job:
        folder = self.folder / "runs" / self.plan.arm(arm).arm.slug / f"{kind}-{trial.number:03d}"
        return Job(arm, kind, trial.number, trial.user_attrs.get("seed", trial.number), dict(trial.params), folder)

    def _hold(self, folder: Path) -> bool:
        """Take a run's folder; False where another process holds it, or its training goes on."""
        if folder in self._held:
            return False
        try:
            lock = Lock(folder / LOCK)
        except RunFolderError:
            return False
        self._held[folder] = lock
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the comparison for a moment."""
        lock = None
        while lock is None:
            with suppress(RunFolderError):
                lock = Lock(self.folder / LOCK)
            if lock is None:
                time.sleep(0.05)
        try:
            yield
        finally:
            lock.release()


def open_storage(where: str) -> Any:
    """Optuna's storage of a URL of a database, or of a journal file.

    Raises:
        SettingsError: it cannot be opened.
    """
    if "://" not in where:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        return JournalStorage(JournalFileBackend(where, lock_obj=JournalFileOpenLock(where)))
    try:
        from sqlalchemy.pool import NullPool

        return optuna.storages.RDBStorage(where, engine_kwargs={"poolclass": NullPool})  # no connection is left open
    except Exception as error:
        raise SettingsError(f'--storage is "{where}"; it cannot be opened: {str(error).splitlines()[0]}') from error


def folder_in(storage: str) -> Path:
    """The folder of the newest comparison in a database.

    Raises:
        RunFolderError: there is none.
    """
    known = [s for s in optuna.get_all_study_summaries(open_storage(storage)) if FOLDER in s.user_attrs]
    if not known:
        raise RunFolderError(f'--join is "{storage}"; no comparison has begun there.')
    return Path(max(known, key=lambda summary: summary._study_id).user_attrs[FOLDER])


def _space(text: str) -> BaseDistribution:
    """A space of `--tune`: LOW..HIGH, then `:log` or `:int` or both.

    Raises:
        SettingsError: anything else.
    """
    bounds, *kinds = text.split(":")
    low, dots, high = bounds.partition("..")
    try:
        if not dots or set(kinds) - {"log", "int"}:
            raise ValueError
        if "int" in kinds:
            return IntDistribution(int(low), int(high), log="log" in kinds)
        return FloatDistribution(float(low), float(high), log="log" in kinds)
    except ValueError:
        raise SettingsError(
            f'--tune: "{text}" is no space; write LOW..HIGH, with :log or :int behind it, such as 8..64:log.'
        ) from None


def check_spaces(spaces: dict[str, str]) -> None:
    """Raise `SettingsError` for a space that cannot be read."""
    for text in spaces.values():
        _space(text)
