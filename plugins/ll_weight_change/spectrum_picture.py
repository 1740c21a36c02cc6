"""The picture of effective ranks: against the layer at the end of each run, and over its steps.

After the spectra of Biderman et al., 2024, arXiv:2405.09673. Dotted: what the sizes of the layers allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ll_weight_change.picture import MARKERS, new_figure, save
from ll_weight_change.spectrum_records import Spectra


def draw_spectra(path: Path, runs: Sequence[Spectra], kinds: Sequence[str]) -> None:
    """Write a PNG with a column for each module type: effective rank against the layer above the one over steps."""
    shown = [kind for kind in kinds if any(kind in run.kinds() for run in runs)]
    figure = new_figure(len(shown), 2)
    for column, kind in enumerate(shown):
        layers = figure.add_subplot(2, len(shown), column + 1)
        course = figure.add_subplot(2, len(shown), len(shown) + column + 1)
        having = [run for run in runs if kind in run.kinds()]
        drawn: list[float] = []
        for number, run in enumerate(having):
            style = {"marker": MARKERS[number % len(MARKERS)], "ms": 5, "alpha": 0.8, "label": run.label}
            last = run.last(kind)
            layers.plot([rank.index for rank in last], [rank.effective for rank in last], **style)
            means = [run.mean(kind, step) for step in run.steps()]
            course.plot(run.steps(), means, **style)
            drawn += [*means, *(rank.effective for rank in last)]
        most = max(rank.largest for run in having for rank in run.last(kind))
        positive = [value for value in drawn if value > 0]
        wide = bool(positive) and max(positive) > 20 * min(positive)
        fraction = f"{having[0].fraction:.0%}"
        for axes, across in ((layers, "layer"), (course, "optimizer step")):
            if wide or (positive and most > 20 * max(positive)):
                axes.set_yscale("log")
            axes.axhline(most, color="0.4", lw=1, ls=":", label="what its size allows")
            mean = "mean " if axes is course else ""
            axes.set(title=kind, xlabel=across, ylabel=f"{mean}effective rank at {fraction}")
            places = sorted({place for line in axes.lines[:-1] for place in line.get_xdata()})
            if len(places) == 1:
                axes.set_xticks(places)
            else:
                axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7)
    save(figure, path)
