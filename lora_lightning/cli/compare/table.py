"""The table of a comparison, for terminals and pages, and what it says in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import StringIO

import numpy as np
from rich.console import Console
from rich.table import Table

from lora_lightning.cli.compare.outcomes import ArmOutcome
from lora_lightning.cli.compare.plan import Plan
from lora_lightning.cli.compare.statistics import in_words
from lora_lightning.cli.compare.studies import RATE

FRACTIONS = ("accuracy", "f1", "mcc", "exact_match", "bleu", "chrf", "rouge_l", "mrr")
"""Metrics between 0 and 1, whose hundredths are points."""


def is_fraction(metric: str) -> bool:
    """Whether a metric's hundredths are points."""
    return metric in FRACTIONS


def columns(plan: Plan, found: Sequence[ArmOutcome]) -> list[str]:
    """Heads of the table."""
    to = {one.against for one in found if one.against}
    difference = ["difference", "to"] if len(to) > 1 else [f"difference to {found[0].name}"]
    heads = ["arm", plan.metric, *difference, "p", "seeds", "rate"]
    heads += [name.rpartition(".")[2] for name in plan.searched]
    heads += ["trained", "ms a step", "peak memory", "file"]
    if plan.also and any(one.forgetting(plan.metric) for one in found):
        heads.append(f"change of {plan.metric} beside")
    return heads


def rows(plan: Plan, found: Sequence[ArmOutcome]) -> list[list[str]]:
    """One row an arm."""
    heads = columns(plan, found)
    return [_row(plan, one, heads) for one in found]


def _row(plan: Plan, one: ArmOutcome, heads: Sequence[str]) -> list[str]:
    facts, difference = one.planned.facts, one.difference
    spread = "" if math.isnan(one.deviation) else f" ± {number(one.deviation, plan.metric)}"
    cells = [
        one.name,
        f"{number(one.mean, plan.metric)}{spread}" if one.finals else "-",
        "" if difference is None else _interval(difference.mean, difference.low, difference.high, plan.metric),
        *([one.against] if "to" in heads else []),
        "" if difference is None else _p(difference.p),
        f"{len(one.finals)}" + (f" ({len(one.failures)} failed)" if one.failures else ""),
        f"{one.best[RATE]:.3g}" + (" (edge)" if one.on_edge else ""),
        *(f"{one.best[name]:.3g}" if name in one.best else "" for name in plan.searched),
        f"{facts.trained_numbers:,}",
        _plain(1000 * one.cost("step_seconds"), 1),
        size(one.cost("peak_device_bytes"), one.cost("peak_bytes")),
        size(float(one.file_bytes or math.nan)),
    ]
    if len(cells) < len(heads):
        changes = one.forgetting(plan.metric)
        cells.append(f"{number(float(np.mean(changes)), plan.metric, sign=True)}" if changes else "")
    return cells


def markdown(plan: Plan, found: Sequence[ArmOutcome]) -> str:
    """The table for pages."""
    heads = columns(plan, found)
    lines = [heads, ["---"] * len(heads), *rows(plan, found)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def text(plan: Plan, found: Sequence[ArmOutcome]) -> str:
    """The table for a terminal."""
    heads = columns(plan, found)
    shown = Table(title=f"validation {plan.metric}", title_justify="left")
    for name in heads:
        shown.add_column(name, justify="left" if name == "arm" else "right", overflow="fold")
    for cells in rows(plan, found):
        shown.add_row(*cells)
    out = StringIO()
    Console(file=out, width=max(100, 14 * len(heads))).print(shown)
    return out.getvalue().rstrip()


def sentences(plan: Plan, found: Sequence[ArmOutcome]) -> list[str]:
    """What can be said of each arm beside the one that it is compared with, and what stands in the way."""
    by_name = {one.name: one for one in found}
    said = []
    for one in found[1:]:
        if one.difference is not None:
            how = "" if one.difference.over_rows else " (over seeds alone: this metric is no mean over rows)"
            said.append(f"{one.name} against {one.against}: {in_words(one.difference, is_fraction(plan.metric))}{how}.")
        elif not one.finals:
            why = f": {one.failures[-1].reason}" if one.failures else ""
            said.append(f"{one.name}: no final run has come out{why}.")
        elif len(one.finals) < 2 or len(by_name[one.against].finals) < 2:
            said.append(f"{one.name} against {one.against}: of one seed nothing can be said; --seeds 3 takes three.")
    said += [
        f"{one.name}: its best rate, {one.best[RATE]:.3g}, is the {_side(one)} that was tried; the best may lie beyond."
        for one in found
        if one.on_edge
    ]
    return said


def _side(one: ArmOutcome) -> str:
    return "highest" if one.best[RATE] >= max(done.job.values[RATE] for done in one.tuning) else "lowest"


def number(value: float, metric: str, sign: bool = False) -> str:
    """A metric's value: percent where it is a fraction, else four digits."""
    if math.isnan(value):
        return "-"
    form = f"{'+' if sign else ''}.2f" if is_fraction(metric) else f"{'+' if sign else ''}.4f"
    return format(100 * value if is_fraction(metric) else value, form)


def _interval(mean: float, low: float, high: float, metric: str) -> str:
    return f"{number(mean, metric, True)} ({number(low, metric, True)} to {number(high, metric, True)})"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def _plain(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def size(*values: float) -> str:
    """The first of some numbers of bytes that is known."""
    value = next((value for value in values if not math.isnan(value)), math.nan)
    if math.isnan(value):
        return "-"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
