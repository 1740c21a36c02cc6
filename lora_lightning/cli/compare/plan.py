"""The plan of a comparison, as `plan.json` in its folder keeps it: arms, budgets, seeds, what is tuned, bounds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_lightning.cli.compare.arms import Arm
from lora_lightning.cli.compare.describe import Described, describe, parse_budget, solve_rank
from lora_lightning.errors import RunFolderError, SettingsError
from lora_lightning.storage.atomic import write_json
from lora_lightning.version import __version__

PLAN = "plan.json"
TUNING_SEED = 1000
"""Seed of all tuning runs; that of final runs counts from 0."""
ALIKE = 0.1
"""An arm without a size that could be solved for may be so far from the budget, as a fraction of it."""
QUIET = {
    "trainer.enable_progress_bar": False,
    "trainer.num_sanity_val_steps": 0,
    "model.linear_baseline": False,
}
"""Settings of all runs, which any arm may change."""


@dataclass(frozen=True)
class PlannedArm:
    """An arm with everything that was found out about it."""

    arm: Arm
    facts: Described
    words: tuple[str, ...]
    """Flags of its runs, but for the rate and seeds."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a comparison does."""

    arms: tuple[PlannedArm, ...]
    seeds: int
    tune_rate: bool
    fraction: float
    """Of the training rows that tuning runs validate on."""
    searched: Mapping[str, str]
    """Further settings that are tuned, by dotted name: LOW..HIGH, with `:log` or `:int`."""
    searches: int
    """Runs of an arm that search them."""
    pruner: str
    same_time: bool
    """Whether arms get equal measured time instead of equal steps."""
    also: tuple[str, ...]
    minutes: float | None
    """Most of them for a run."""
    memory_gib: float | None
    """Most of it for a run."""
    until: float | None
    """Half width of intervals, as a fraction, below which no further seeds are added."""
    storage: str
    """Where Optuna keeps the studies; empty for the journal file of the folder."""
    budget: str | None = None
    """Numbers of adapters that arms were given, as `--budget` says it."""
    version: str = __version__

    @property
    def metric(self) -> str:
        """What arms are compared by."""
        return self.arms[0].facts.metric

    @property
    def higher_is_better(self) -> bool:
        """Its direction."""
        return self.arms[0].facts.higher_is_better

    def arm(self, name: str) -> PlannedArm:
        """The arm of a name."""
        return next(one for one in self.arms if one.arm.name == name)

    def reference(self, name: str) -> PlannedArm:
        """The arm that an arm is compared with; the first one is compared with itself."""
        return self.arm(self.arm(name).arm.against or self.arms[0].arm.name)

    @property
    def pairs(self) -> dict[str, str]:
        """Names of arms, and of those that they are compared with."""
        return {name: other for one in self.arms if (other := self.reference(name := one.arm.name).arm.name) != name}

    def write(self, folder: Path) -> None:
        """Into a comparison's folder."""
        write_json(folder / PLAN, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """From a comparison's folder.

        Raises:
            RunFolderError: it is none.
        """
        try:
            read = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f'"{folder}" holds no {PLAN}, so it is no comparison\'s folder.') from error
        read["arms"] = tuple(
            PlannedArm(
                Arm(**{**one["arm"], "configs": tuple(one["arm"]["configs"])}),
                Described(**{**one["facts"], "optimizer_words": tuple(one["facts"]["optimizer_words"])}),
                tuple(one["words"]),
            )
            for one in read["arms"]
        )
        return cls(**{**read, "also": tuple(read["also"])})


def planned_arms(
    words: Sequence[str],
    arms: Sequence[Arm],
    budget: str | None,
    tell: Callable[[str], object],
    there: Sequence[PlannedArm] = (),
) -> tuple[PlannedArm, ...]:
    """Describe all arms, and solve their ranks for a budget.

    Args:
        words: flags of all arms.
        arms: what is compared.
        budget: numbers of adapters, see `parse_budget`; None leaves ranks as they are.
        tell: is given a line for each arm that is new.
        there: arms of a comparison that has begun; they stay, and stand first.

    Raises:
        SettingsError: arms whose metrics differ, a budget that an arm cannot have, or one that is there with other
            settings.
    """
    known = {one.arm.name: one for one in there}
    found: list[PlannedArm] = []
    wanted: dict[str, int] = {}
    for arm in sorted(arms, key=lambda arm: bool(arm.against)):  # those that others are measured by come first
        own = [*quiet(), *words, *arm.words()]
        old = known.pop(arm.name, None)
        if old is not None:
            _check_same(old, arm, own)
        facts = old.facts if old is not None else describe(own)
        if found and facts.metric != found[0].facts.metric:
            raise SettingsError(
                f'compare: "{arm.name}" is measured by {facts.metric}, and "{found[0].arm.name}" by '
                f"{found[0].facts.metric}; arms need one task."
            )
        note = ""
        if budget is not None and facts.adapter_numbers:
            numbers = parse_budget(budget, facts.total_numbers, facts.adapter_numbers)
            wanted[arm.name] = numbers = wanted.get(arm.against or arms[0].name, numbers)
            alike = not facts.size_field and abs(facts.adapter_numbers - numbers) <= ALIKE * numbers
            if alike and old is None:
                note = f", by its own settings, beside a budget of {numbers:,}"
            elif old is None and facts.adapter_numbers != numbers:
                rank, reached = solve_rank(own, facts, numbers)
                own += [f"--{facts.size_field}", str(rank)]
                facts = dataclasses.replace(facts, adapter_numbers=reached)
                note = f", {facts.size_field.rpartition('.')[2]} {rank} for a budget of {numbers:,}"
        if old is not None:
            found.append(old)
            continue
        found.append(PlannedArm(arm, facts, tuple(own)))
        tell(
            f"{arm.name}: {facts.adapter_numbers:,} numbers of adapters and {facts.head_numbers:,} others train{note}; "
            f"rate {facts.rate:g} at first"
        )
    new = sorted((one for one in found if one not in there), key=lambda one: arms.index(one.arm))
    return (*there, *new)


def _check_same(old: PlannedArm, arm: Arm, words: Sequence[str]) -> None:
    """Raise `SettingsError` for an arm whose settings are not those that its runs have had."""
    if old.arm == arm and list(old.words[: len(words)]) == list(words):
        return
    now, before = list(words), list(old.words)
    differing = next((word for word in [*now, *before] if now.count(word) != before.count(word)), arm.name)
    raise SettingsError(
        f'compare --resume: the arm "{arm.name}" was planned with other settings ({differing}); its runs keep them. '
        "Give the new arm another name, or begin another comparison."
    )


def quiet() -> list[str]:
    """Flags that come before all others."""
    return [word for key, value in QUIET.items() for word in (f"--{key}", json.dumps(value))]


def rate_words(planned: PlannedArm, rate: float) -> list[str]:
    """Flags that give an arm its rate, and the optimizer that it would have taken by itself."""
    facts = planned.facts
    return [*facts.optimizer_words, f"--{facts.rate_field}", repr(rate)]


def seed_words(planned: PlannedArm, seed: int) -> list[str]:
    """Flags that give a run its seed: of start values, dropout, and the order of the data."""
    return ["--seed_everything", str(seed), *(["--data.seed", str(seed)] if planned.facts.data_seed else [])]
