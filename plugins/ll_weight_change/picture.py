"""The two pictures of the weight decomposition analysis: dM against dD with its line, and both against the layer.

After figures 2 and 3 of Liu et al., 2024, arXiv:2402.09353: x is dD, y is dM, a colour a layer, a marker a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ll_weight_change.records import Point, Run
from lora_lightning.adapters.weight_change import least_squares, pearson
from lora_lightning.storage.atomic import write_atomically

MARKERS = "osD^vP*Xph"


@dataclass(frozen=True)
class Fit:
    """One panel: a module type of a run."""

    run: Run
    kind: str
    points: tuple[Point, ...]
    correlation: float
    """Pearson's r of dD and dM over layers and checkpoints."""
    slope: float
    intercept: float

    @property
    def steps(self) -> list[int]:
        """Checkpoints, in order."""
        return sorted({point.step for point in self.points})

    def last(self) -> list[Point]:
        """Points of the last checkpoint, by layer."""
        return sorted((p for p in self.points if p.step == self.steps[-1]), key=lambda point: point.index)

    def numbers(self) -> tuple[float, float, float, float]:
        """Correlation, slope, and mean dM and dD at the last checkpoint."""
        last = self.last()
        dM, dD = (sum(values) / len(last) for values in ([p.magnitude for p in last], [p.direction for p in last]))
        return self.correlation, self.slope, dM, dD


def fits(runs: Sequence[Run], kinds: Sequence[str]) -> list[Fit]:
    """A panel for each run and module type that it has."""
    return [_fit(run, kind) for run in runs for kind in kinds if run.of(kind)]


def _fit(run: Run, kind: str) -> Fit:
    points = run.of(kind)
    x, y = [p.direction for p in points], [p.magnitude for p in points]
    return Fit(run, kind, tuple(points), pearson(x, y), *least_squares(x, y))


def draw_scatter(path: Path, panels: Sequence[Fit]) -> None:
    """Write a PNG with a panel for each run and module type: every layer at every checkpoint, and the fitted line."""
    figure, grid = _grid(panels)
    for fit, axes in grid:
        for number, step in enumerate(fit.steps):
            points = [point for point in fit.points if point.step == step]
            shades = axes.scatter(
                [p.direction for p in points],
                [p.magnitude for p in points],
                c=[p.index for p in points],
                marker=MARKERS[number % len(MARKERS)],
                label=f"step {step}",
                cmap="viridis",
                vmin=0,
                vmax=max(1, *(p.index for p in fit.points)),
                s=22,
            )
        ends = [extreme(p.direction for p in fit.points) for extreme in (min, max)]
        if fit.slope == fit.slope:  # NaN: no line
            axes.plot(ends, [fit.intercept + fit.slope * end for end in ends], color="0.4", lw=1)
        axes.set(title=f"{fit.run.label}, {fit.kind}: r = {fit.correlation:+.2f}", xlabel="dD", ylabel="dM")
        _short_ticks(axes, "both")
        for handle in axes.legend(fontsize=7).legend_handles:
            handle.set(array=None, color="0.4")  # a marker is a checkpoint, whatever the layer's colour
        figure.colorbar(shades, ax=axes, label="layer").locator.set_params(integer=True)
    save(figure, path)


def draw_layers(path: Path, panels: Sequence[Fit]) -> None:
    """Write a PNG with a column for each module type: dM above dD against the layer, at the end of each run."""
    kinds = list(dict.fromkeys(fit.kind for fit in panels))
    figure = new_figure(len(kinds), 2)
    for row, name in enumerate(("dM", "dD")):
        for column, kind in enumerate(kinds):
            axes = figure.add_subplot(2, len(kinds), row * len(kinds) + column + 1)
            for number, fit in enumerate(fit for fit in panels if fit.kind == kind):
                values = [point.magnitude if name == "dM" else point.direction for point in fit.last()]
                marker = MARKERS[number % len(MARKERS)]
                axes.plot(
                    [point.index for point in fit.last()], values, marker=marker, ms=5, alpha=0.7, label=fit.run.label
                )
            axes.set(title=kind, xlabel="layer", ylabel=name)
            axes.xaxis.get_major_locator().set_params(integer=True)
            _short_ticks(axes, "y")
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7)
    save(figure, path)


def _short_ticks(axes: Any, axis: str) -> None:
    """A common power of ten beside small numbers, whose digits would run into one another."""
    axes.ticklabel_format(axis=axis, style="sci", scilimits=(-2, 4))
    axes.locator_params(axis=axis, nbins=5)


def _grid(panels: Sequence[Fit]) -> tuple[Any, list[tuple[Fit, Any]]]:
    """A figure with a row for each run and a column for each module type."""
    runs = list(dict.fromkeys(id(fit.run) for fit in panels))
    kinds = list(dict.fromkeys(fit.kind for fit in panels))
    figure = new_figure(len(kinds), len(runs))
    places = [(runs.index(id(fit.run)) * len(kinds) + kinds.index(fit.kind) + 1, fit) for fit in panels]
    return figure, [(fit, figure.add_subplot(len(runs), len(kinds), place)) for place, fit in places]


def new_figure(columns: int, rows: int) -> Any:
    """An empty figure for a grid of panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    image = BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(path, lambda file: file.write(image.getvalue()))
