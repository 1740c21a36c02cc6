"""The picture of a barrier: the loss along the line between two adapters, one curve a space."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from ll_rebasin.barrier import Barrier
from lora_lightning.storage.atomic import write_atomically

_NAMES = {"update": "updates", "factors": "factors as they are", "aligned": "aligned factors"}
_MARKERS = {"update": "o", "factors": "s", "aligned": "D"}


def draw_barrier(path: str | Path, barriers: Sequence[Barrier], a: str, b: str, loss: str = "loss") -> None:
    """Write a PNG: losses over t, with the straight line between the ends dotted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for one in barriers:
        label = f"mean of {_NAMES[one.space]}: barrier {one.height:.3g}"
        axes.plot(one.positions, one.losses, marker=_MARKERS[one.space], ms=4, alpha=0.8, label=label)
    first = barriers[0]
    axes.plot([0, 1], [first.losses[0], first.losses[-1]], color="0.4", lw=1, ls=":", label="straight line")
    axes.set(title=f"from {a} (0) to {b} (1)", xlabel="t", ylabel=loss)
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)  # not on the curves
    image = BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(Path(path), lambda file: file.write(image.getvalue()))
