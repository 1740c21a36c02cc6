"""The picture of learning and forgetting: each set over steps, and what was learned against what was forgotten.

After the trade-offs of Biderman et al., 2024, arXiv:2405.09673: a line a run through its checkpoints, large at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ll_weight_change.picture import MARKERS, new_figure, save
from lora_lightning.callbacks.forgetting import TARGET, Course


def common_metrics(runs: Sequence[Course]) -> list[str]:
    """Metrics that every set of every run has."""
    return [name for name in runs[0].metrics() if all(name in run.metrics() for run in runs)] if runs else []


def draw_forgetting(path: Path, runs: Sequence[Course], metric: str) -> None:
    """Write a PNG: the target and each source's change over steps above, the target against each source below."""
    sources = list(dict.fromkeys(name for run in runs for name in run.sources))
    targets = [run for run in runs if run.target is not None]
    figure = new_figure(len(sources) + bool(targets), 2 if targets else 1)
    rows = 2 if targets else 1
    columns = len(sources) + bool(targets)
    for column, name in enumerate(sources):
        axes = figure.add_subplot(rows, columns, column + 1)
        for number, run in enumerate(runs):
            if name in run.sources:
                axes.plot(*zip(*run.changes(name, metric), strict=True), **_style(number, run))
        axes.axhline(0, color="0.4", lw=1, ls=":")
        _finish(axes, f"{name}: forgetting", "optimizer step", f"change of {metric}")
        if targets:
            axes = figure.add_subplot(rows, columns, columns + column + 1)
            for number, run in enumerate(runs):
                if name in run.sources and run.target is not None:
                    _trade_off(axes, run, name, metric, number)
            axes.axvline(0, color="0.4", lw=1, ls=":")
            _finish(axes, f"learned against {name}", f"change of {metric} on {name}", f"{metric} on target")
    if targets:
        axes = figure.add_subplot(rows, columns, columns)
        for number, run in enumerate(runs):
            if run.target is not None:
                axes.plot(*zip(*run.values(TARGET, metric), strict=True), **_style(number, run))
        _finish(axes, "target: learning", "optimizer step", metric)
    save(figure, path)


def _trade_off(axes: Any, run: Course, name: str, metric: str, number: int) -> None:
    """A line through the checkpoints, which begins at the base model."""
    changes = [value for _, value in run.changes(name, metric)]
    learned = [value for _, value in run.values(TARGET, metric)]
    style = _style(number, run)
    (line,) = axes.plot(changes, learned, **{**style, "ms": 3, "label": None}, lw=1)
    axes.plot(changes[-1:], learned[-1:], **{**style, "ms": 8, "ls": "", "color": line.get_color()})


def _style(number: int, run: Course) -> dict[str, Any]:
    return {"marker": MARKERS[number % len(MARKERS)], "ms": 4, "alpha": 0.8, "label": run.label, "color": f"C{number}"}


def _finish(axes: Any, title: str, across: str, up: str) -> None:
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
