"""What a run shows: the table of what was adapted, the closing summary, and the picture of its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_lightning.models.tasks.generated import TEXT_METRICS
from lora_lightning.storage.atomic import write_atomically

BESIDE = (*TEXT_METRICS, "exact_match")
"""Metrics of texts that stand beside the task's own in the table, where they were measured."""
PANELS = {
    "learning rate": ("lr", "lr_"),
    "gradient norm": ("grad_norm", "grad_norm_"),
    "tokens a second": ("tokens_per_second",),
    "examples a second": ("examples_per_second",),
    "padding": ("padding",),
}
"""What `Meters` logs, by the title of its panel: names, and beginnings of names that end in an underscore."""
TRENDS = {
    "falling": "the training loss was still falling at the end; train longer (trainer.max_steps, trainer.max_epochs) "
    "or at a higher rate{rate}",
    "never fell": "the training loss never fell; try a rate ten times as high and one ten times as low{rate}, look at "
    "what is learned (inspect-data), and give the adapter more layers or a larger rank",
}
"""What to say of the training loss, by `lora_lightning.training.loss_trend.trend`."""


def summary_table(summary: Mapping[str, Any]) -> Group:
    """The closing summary of `summary.json`, for people."""
    metric = summary["metric"]
    table = Table(title=f"validation {metric}", title_justify="left")
    table.add_column("model")
    names = [metric, *(name for name in BESIDE if name in summary["values"] and name != metric)]
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    started = summary.get("started_from", [])
    untrained = "untrained head" if summary["has_head"] and not started else "before training"
    table.add_row(untrained, *(_number(summary["untrained"].get(name)) for name in names))
    if (linear := summary["linear_baseline"]) is not None:
        table.add_row("linear baseline, as many steps", *(_number(linear.get(name)) for name in names))
    table.add_row(summary["method"], *(_number(summary["values"].get(name)) for name in names), style="bold")
    lines = [
        f"trained     {summary['trainable_parameters']:,} parameters; "
        f"{summary['surviving_parameters']:,} adapter entries are not zero"
    ]
    facts = {key: value for key, value in summary["report"].items() if not isinstance(value, dict)}
    if facts:
        lines.append(
            "facts       " + ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in facts.items())
        )
    changed = summary["changed"]
    if changed:
        least = min(changed, key=changed.__getitem__)
        what = (
            "trained tensors and folded layers" if any(" (folded)" in name for name in changed) else "trained tensors"
        )
        lines.append(f"changed     all {len(changed)} {what}, the least by {changed[least]:.2g} ({least})")
    if summary["damping_raised"]:
        lines.append(f"damping     {_raised(summary['damping_raised'])}")
    for split, counts in summary.get("data", {}).items():
        if counts.get("dropped"):
            lines.append(f"data        {counts['dropped']:,} {split} examples had nothing to learn and were left out")
        if counts.get("skipped"):
            why = summary.get("left_out", {}).get(split, "")
            lines.append(f"data        {counts['skipped']:,} {split} rows were left out{f': {why}' if why else ''}")
    lines += [f"result      {text}" for text in verdicts(summary)]
    for one in started:
        lines.append(f"{one['role']:<12}{one['adapter']} ({one['format']}, sha256 {one['sha256'][:12]})")
    lines.append(f"time        {summary['seconds']:.0f} s")
    lines.append(f"adapter     {summary['adapter_dir']}")
    return Group(table, Text("\n".join(lines)))


def progress_line(step: int, total: int | None, values: Mapping[str, float]) -> str:
    """One line of a log: the step, of how many, and the numbers."""
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    return f"step {step}{f' of {total}' if total else ''}: {numbers}"


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """What speaks against a run; empty where nothing does.

    No better than it began, than chance, or than the linear baseline; a loss that fell still at the end, or never.
    """
    rate = summary.get("rate")
    told = TRENDS.get(summary.get("trend") or "", "")
    trends = [told.format(rate="" if rate is None else f" (it was {rate:g})")] if told else []
    return [*_compared(summary), *trends]


def _compared(summary: Mapping[str, Any]) -> list[str]:
    metric, values = summary["metric"], summary["values"]
    now, before = values.get(metric), summary["untrained"].get(metric)
    if now is None:
        return []
    sign = 1 if summary.get("higher_is_better", metric != "loss") else -1
    rate = summary.get("rate")
    advice = f"; the rate was {rate:g}, try others" if rate is not None else "; try other rates"
    found = []
    if before is not None and not sign * now > sign * before:  # a number that is none is no better
        found.append(f"no better than before training ({metric} {_number(now)}, it was {_number(before)}){advice}")
    chance = summary.get("chance")
    if chance is not None and now <= chance:
        found.append(f"no better than always naming the most frequent class ({metric} {_number(chance)}){advice}")
    linear = (summary["linear_baseline"] or {}).get(metric)
    if not found and linear is not None and sign * now < sign * linear:
        found.append(f"worse than a linear head on frozen features ({metric} {_number(linear)}){advice}")
    return found


def _raised(counts: Mapping[str, int]) -> str:
    """At how many steps an optimizer raised its damping, for up to three pairs by name."""
    named = [f"{_many(count, 'step')} for {pair}" for pair, count in list(counts.items())[:3]]
    more = len(counts) - len(named)
    return f"was raised at {', '.join(named)}" + (f", and for {_many(more, 'pair')} more" if more else "")


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count:,} {what}s"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):  # four digits: small numbers such as mean changes of weights keep theirs too
        return f"{value:.4f}" if value == 0 or abs(value) >= 0.1 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def draw(path: Path, history: Sequence[Mapping[str, float]], metric: str, levels: Mapping[str, float]) -> None:
    """Write a picture of a run over its optimizer steps: loss, metric, what schedules and meters have logged.

    Args:
        path: a PNG file.
        history: one dictionary a point, each with `step`.
        metric: the validation metric of the second panel.
        levels: horizontal lines of the second panel by label, such as the linear baseline.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[str, list[str]]] = [("loss", ["train_loss", "val_loss"])]
    if metric != "loss":
        panels.append((metric, [f"val_{metric}"]))
    there = sorted({name for point in history for name in point})
    panels += [(name, [name]) for name in ("sparsity", "rank", "stage") if name in there]
    for title, names in PANELS.items():
        if keys := [key for key in there if key in names or key.startswith(tuple(n for n in names if n[-1] == "_"))]:
            panels.append((title, keys))
    columns = len(panels) if len(panels) <= 4 else 4 if len(panels) in (7, 8) else 3
    rows = -(-len(panels) // columns)
    width, height = 4.2 * columns, 3.2 * rows
    figure = Figure(figsize=(width, height))
    # margins in inches; a layout engine finds nearly the same ones, and takes as long as all of the drawing
    figure.subplots_adjust(
        0.7 / width, 0.5 / height, 1 - 0.2 / width, 1 - 0.35 / height, wspace=0.7 / 3.3, hspace=0.85 / 2.35
    )
    FigureCanvasAgg(figure)
    for index, (title, keys) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        _curves(axes, history, title, keys)
        if title == metric:
            for level, (label, value) in enumerate(levels.items()):
                axes.axhline(value, color="0.5", ls=("--", ":")[level % 2], lw=1, label=label)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(fontsize=8)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(path, lambda file: file.write(image.getvalue()))


def _curves(axes: Any, history: Sequence[Mapping[str, float]], title: str, keys: Sequence[str]) -> None:
    """One panel: a curve for each key."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

    values: list[float] = []
    for key in keys:
        points = [(point["step"], point[key]) for point in history if key in point]
        values += [value for _, value in points]
        if points:
            marked = (key.startswith("val_") and len(points) <= 60) or len(points) == 1  # a line of one point is none
            axes.plot(*zip(*points, strict=True), label=key, marker="o" if marked else None, ms=3)
    last = max((point["step"] for point in history), default=1)
    axes.set(title=title, xlabel="optimizer step", xlim=(0, 1.02 * last))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if last >= 20_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    if title == "gradient norm" and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif title == "learning rate":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:.2g}")
    elif title.endswith(" a second"):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif title == "padding":
        axes.set_ylim(0, max(0.1, 1.1 * max(values)))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
