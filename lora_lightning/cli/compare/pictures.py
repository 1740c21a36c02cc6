"""Pictures of a comparison: values with intervals, quality against cost, learning curves, and rates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np

from lora_lightning.cli.compare import table
from lora_lightning.cli.compare.child import BESIDE
from lora_lightning.cli.compare.outcomes import ArmOutcome, FinalRun
from lora_lightning.cli.compare.plan import Plan
from lora_lightning.cli.compare.studies import RATE
from lora_lightning.storage.atomic import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D1F", "#4C8FD0", "#7A4FBF", "#7F7F7F")
"""Told apart by people who see few colours, on white and on black (after Okabe and Ito)."""
MARKS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
INK = "#123456"
"""Stands for the colour of text, which the page gives."""

Panel = Callable[[Any, Plan, Sequence[ArmOutcome]], bool]


def styles(found: Sequence[ArmOutcome]) -> dict[str, dict[str, Any]]:
    """Colour, mark and line of each arm; marks and lines tell arms apart without colour, too."""
    turns = zip(itertools.cycle(COLOURS), itertools.cycle(MARKS), itertools.cycle(LINES), found, strict=False)
    return {one.name: {"color": colour, "marker": mark, "linestyle": line} for colour, mark, line, one in turns}


def values(axes: Any, plan: Plan, found: Sequence[ArmOutcome]) -> bool:
    """Each seed, and the mean with its standard deviation, of each arm."""
    ready = [one for one in found if one.finals]
    style = styles(found)
    for row, one in enumerate(ready):
        scaled = [_scaled(value, plan.metric) for value in one.values]
        axes.plot(scaled, [row] * len(scaled), ls="", marker="|", ms=10, color=style[one.name]["color"])
        spread = 0.0 if math.isnan(one.deviation) else _scaled(one.deviation, plan.metric)
        axes.errorbar(
            _scaled(one.mean, plan.metric), row, xerr=spread, capsize=4,
            color=style[one.name]["color"], marker=style[one.name]["marker"], ms=6,
        )  # fmt: skip
    axes.set_yticks(range(len(ready)), [one.name for one in ready])
    axes.set_ylim(len(ready) - 0.4, -0.6)
    axes.set(title=f"{plan.metric} by arm: seeds, mean, standard deviation", xlabel=_axis(plan.metric))
    return bool(ready)


def differences(axes: Any, plan: Plan, found: Sequence[ArmOutcome]) -> bool:
    """Differences with their intervals."""
    ready = [one for one in found if one.difference is not None]
    style = styles(found)
    for row, one in enumerate(ready):
        d = one.difference
        assert d is not None
        mean, low, high = (_scaled(value, plan.metric) for value in (d.mean, d.low, d.high))
        axes.errorbar(
            mean, row, xerr=[[mean - low], [high - mean]], capsize=4,
            color=style[one.name]["color"], marker=style[one.name]["marker"], ms=6,
        )  # fmt: skip
    axes.axvline(0, color=INK, lw=1, ls=":")
    one_reference = len({one.against for one in ready}) < 2
    names = [one.name if one_reference else f"{one.name} - {one.against}" for one in ready]
    axes.set_yticks(range(len(ready)), names)
    axes.set_ylim(len(ready) - 0.4, -0.6)
    to = f" to {found[0].name}" if one_reference else "s of pairs"
    axes.set(title=f"difference{to}; right of 0 is better", xlabel=_axis(plan.metric))
    return bool(ready)


def costs(name: str, label: str, cost: Callable[[ArmOutcome], float]) -> Panel:
    """A panel of quality against a cost, with the Pareto front."""

    def draw_costs(axes: Any, plan: Plan, found: Sequence[ArmOutcome]) -> bool:
        points = {one.name: (cost(one), _scaled(one.mean, plan.metric)) for one in found if one.finals}
        points = {arm: point for arm, point in points.items() if not math.isnan(point[0])}
        style = styles(found)
        for arm, (x, y) in points.items():
            axes.plot([x], [y], ls="", ms=8, color=style[arm]["color"], marker=style[arm]["marker"], label=arm)
        front = pareto(list(points.values()), plan.higher_is_better)
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), color=INK, lw=1, ls=":", zorder=0)
        axes.set(title=f"{plan.metric} against {name}; dotted: the best for its cost", xlabel=label)
        axes.set_ylabel(_axis(plan.metric))
        drawn = [x for x, _ in points.values()]
        if drawn and max(drawn) > 20 * min(drawn) > 0:
            axes.set_xscale("log")
        return bool(points)

    return draw_costs


def pareto(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[tuple[float, float]]:
    """Points that none is both cheaper and better than, by rising cost."""
    sign = 1 if higher_is_better else -1
    found: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (p[0], -sign * p[1])):
        if not found or sign * point[1] > sign * found[-1][1]:
            found.append(point)
    return found


def curves(axes: Any, plan: Plan, found: Sequence[ArmOutcome]) -> bool:
    """The metric over steps: mean of seeds, with a band from the lowest to the highest."""
    drawn = False
    for one in found:
        style = styles(found)[one.name]
        steps = sorted(set.intersection(*({p["step"] for p in run.curve} for run in one.finals))) if one.finals else []
        if not steps:
            continue
        rows = np.array([[_at(run.curve, step, plan.metric) for step in steps] for run in one.finals])
        rows = np.vectorize(lambda value: _scaled(value, plan.metric))(rows)
        _band(axes, one.name, steps, rows, style)
        drawn = True
    axes.set(title=f"{plan.metric} while training: mean and range of seeds", xlabel="optimizer step")
    axes.set_ylabel(_axis(plan.metric))
    return drawn


def _band(axes: Any, name: str, steps: Sequence[int], rows: Any, style: dict[str, Any]) -> None:
    """The mean of rows (seeds, steps), and their range around it."""
    axes.plot(steps, rows.mean(0), label=name, ms=4, **style)
    axes.fill_between(steps, rows.min(0), rows.max(0), color=style["color"], alpha=0.15, lw=0)


def rates(axes: Any, plan: Plan, found: Sequence[ArmOutcome]) -> bool:
    """The metric by rate, on the rows that were held out to tune."""
    drawn = False
    for one in found:
        points = sorted(
            (done.job.values[RATE], _scaled(done.value, plan.metric))
            for done in one.tuning
            if done.state == "complete" and set(done.job.values) == {RATE}
        )
        if points:
            axes.plot(*zip(*points, strict=True), label=one.name, ms=5, **styles(found)[one.name])
            drawn = True
    if drawn:
        axes.set_xscale("log")
    axes.set(title=f"{plan.metric} by rate, on rows held out to tune", xlabel="learning rate")
    axes.set_ylabel(_axis(plan.metric))
    return drawn


def beside(axes: Any, plan: Plan, found: Sequence[ArmOutcome]) -> bool:
    """The change on the other data over steps: mean of seeds, with a band from the lowest to the highest."""
    drawn = False
    for one in found:
        changes = _changes(one, plan.metric)
        if not changes:
            continue
        steps = sorted(set.intersection(*(set(change) for change in changes)))
        rows = np.array([[_scaled(change[step], plan.metric) for step in steps] for change in changes])
        _band(axes, one.name, steps, rows, styles(found)[one.name])
        drawn = True
    axes.axhline(0, color=INK, lw=1, ls=":")
    axes.set(title=f"change of {plan.metric} beside while training: mean and range", xlabel="optimizer step")
    axes.set_ylabel(_axis(plan.metric))
    return drawn


def trade_offs(axes: Any, plan: Plan, found: Sequence[ArmOutcome]) -> bool:
    """What was learned against what was forgotten: the mean of seeds at each validation, large at the end."""
    drawn = False
    for one in found:
        runs = [(change, run.curve) for change, run in zip(_changes(one, plan.metric), _with_beside(one), strict=True)]
        if not runs:
            continue
        steps = set.intersection(*(set(change) & {point["step"] for point in curve} for change, curve in runs))
        style = styles(found)[one.name]
        path = [
            (
                float(np.mean([_scaled(change[step], plan.metric) for change, _ in runs])),
                float(np.mean([_scaled(_at(curve, step, plan.metric), plan.metric) for _, curve in runs])),
            )
            for step in sorted(steps)
        ]
        end = (_scaled(float(np.mean(one.forgetting(plan.metric))), plan.metric), _scaled(one.mean, plan.metric))
        axes.plot(*zip(*path, end, strict=True), lw=1, ms=3, **style)
        axes.plot(*end, ls="", ms=9, label=one.name, color=style["color"], marker=style["marker"])
        drawn = True
    axes.axvline(0, color=INK, lw=1, ls=":")
    axes.set(title=f"{plan.metric} learned against its change beside", xlabel=f"change beside: {_axis(plan.metric)}")
    axes.set_ylabel(_axis(plan.metric))
    return drawn


PANELS: dict[str, Panel] = {
    "values": values,
    "differences": differences,
    "numbers": costs(
        "trained numbers",
        "trained numbers, heads included",
        lambda one: float(one.planned.facts.trained_numbers),
    ),
    "time": costs("time", "milliseconds a step", lambda one: 1000 * one.cost("step_seconds")),
    "memory": costs("memory", "peak memory, GiB", lambda one: _memory(one) / 2**30),
    "curves": curves,
    "rates": rates,
    "beside": beside,
    "trade-offs": trade_offs,
}


def svg(name: str, plan: Plan, found: Sequence[ArmOutcome]) -> str:
    """One panel as SVG whose text takes the page's colour; empty where there is nothing to draw."""
    figure, axes = _figure(1, (4.8, 0.7 + max(1.6, 0.34 * len(found)) if name in ("values", "differences") else 3.4))
    if not PANELS[name](axes[0], plan, found):
        return ""
    _finish(axes[0])
    out = StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def draw(path: Path, plan: Plan, found: Sequence[ArmOutcome]) -> None:
    """All panels as one PNG."""
    columns = 3
    rows = -(-len(PANELS) // columns)
    figure, axes = _figure(rows * columns, (6.2 * columns, 3.9 * rows), columns)
    used = 0
    for panel in PANELS.values():
        if panel(axes[used], plan, found):
            _finish(axes[used])
            used += 1
        else:
            axes[used].clear()
    for left in axes[used:]:
        left.set_visible(False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=110)
    write_atomically(path, lambda file: file.write(image.getvalue()))


def _figure(count: int, size: tuple[float, float], columns: int = 1) -> tuple[Any, list[Any]]:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(names, INK) | {"axes.titlesize": 10, "font.size": 9, "svg.fonttype": "none"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        made = [figure.add_subplot(-(-count // columns), columns, index + 1) for index in range(count)]
    return figure, made


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.patch.set_alpha(0)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=8, framealpha=0, labelcolor=INK)


def _scaled(value: float, metric: str) -> float:
    return 100 * value if table.is_fraction(metric) else value


def _axis(metric: str) -> str:
    return f"{metric}, %" if table.is_fraction(metric) else metric


def _at(curve: Sequence[dict[str, Any]], step: int, metric: str) -> float:
    found = [point["values"].get(metric, math.nan) for point in curve if point["step"] == step]
    return float(found[-1])


def _with_beside(one: ArmOutcome) -> list[FinalRun]:
    return [run for run in one.finals if run.beside is not None]


def _changes(one: ArmOutcome, metric: str) -> list[dict[int, float]]:
    """Changes on the other data by step, of each seed; where a step was measured twice, the last time counts."""
    found = [dict(run.beside.changes(BESIDE, metric)) for run in _with_beside(one) if run.beside is not None]
    return [changes for changes in found if changes]


def _memory(one: ArmOutcome) -> float:
    device = one.cost("peak_device_bytes")
    return one.cost("peak_bytes") if math.isnan(device) else device
