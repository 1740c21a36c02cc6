"""What to take: within what noise allows the cheapest arm, else the best one, and its config as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_lightning.cli.compare import statistics, table
from lora_lightning.cli.compare.outcomes import ArmOutcome, tables
from lora_lightning.cli.compare.plan import Plan
from lora_lightning.storage.atomic import write_atomically

CONFIG = "recommended.yaml"


def recommend(folder: Path, plan: Plan, found: Sequence[ArmOutcome]) -> str:
    """One paragraph. The config is written only where there is something to recommend.

    Every arm is compared with the one of the best mean; those whose interval allows that they are no worse are left,
    and of these the one with the fewest trained numbers is taken, then the faster one.
    """
    ready = [one for one in found if len(one.finals) >= 2]
    if len(ready) < 2:
        return "Nothing is recommended: fewer than two arms have two final runs, so that no difference can be judged."
    sign = 1 if plan.higher_is_better else -1
    best = max(ready, key=lambda one: sign * one.mean)
    to_beat = tables(best.finals)
    pairs = {one.name: (to_beat, tables(one.finals)) for one in ready if one is not best}
    compared = statistics.compare(pairs, plan.higher_is_better)
    as_good = [best, *(one for one in ready if one.name in compared and compared[one.name].high >= 0)]
    chosen = min(as_good, key=lambda one: (one.planned.facts.trained_numbers, one.cost("step_seconds")))
    _write_config(folder, chosen)
    worse = [one for one in ready if one not in as_good]
    points = table.is_fraction(plan.metric)
    text = f"Take {chosen.name}: {plan.metric} {table.number(chosen.mean, plan.metric)}"
    if chosen is best:
        text += ", the best mean"
    else:
        text += f"; {best.name} has {table.number(best.mean, plan.metric)}, and against it there is "
        text += statistics.in_words(compared[chosen.name], points)
    if len(as_good) > 1:
        names = ", ".join(one.name for one in as_good if one is not chosen)
        fewest = f"{chosen.planned.facts.trained_numbers:,} numbers, the fewest"
        text += f". It trains {fewest} of the arms that noise does not tell apart ({names})"
    if worse:
        told = ", ".join(f"{one.name} ({statistics.in_words(compared[one.name], points)})" for one in worse)
        text += f". Worse than {best.name}: {told}"
    if chosen.on_edge:
        text += ". Its best rate lies on the edge of those tried, so it may do better still"
    return f"{text}. Its config: {folder / CONFIG} (fit --config takes it)."


def _write_config(folder: Path, chosen: ArmOutcome) -> None:
    run = chosen.best_run
    assert run is not None
    text = (run.folder / "config.yaml").read_bytes()
    write_atomically(folder / CONFIG, lambda file: file.write(text))
