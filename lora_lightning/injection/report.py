"""What `inject` did, for people: lines for `print`, a table for rich and notebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from lora_lightning.methods import Method

if TYPE_CHECKING:
    from rich.console import Group
from dataclasses import fields

from rich.console import Group
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, repr=False)
class InjectionReport:
    """What `inject` did: matched layers, what trains, what stays frozen, what was left out and why.

    `print` gives a few lines; `rich.print`, and a notebook that shows it, the table of layers.
    """

    name: str
    method: Method
    layers: dict[str, tuple[str, int, int]]
    """Path to (kind, d_in, d_out)."""
    adapter_parameters: int
    trained: dict[str, int]
    """Base parameters that train in full, with their sizes."""
    total_parameters: int
    skipped: dict[str, str] = field(default_factory=dict)
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def trainable_parameters(self) -> int:
        """Numbers that train: adapters and fully trained parameters."""
        return self.adapter_parameters + sum(self.trained.values())

    @property
    def left_out(self) -> dict[str, str]:
        """Skipped layers that do not train in full either, and why."""
        return {
            path: reason
            for path, reason in self.skipped.items()
            if not any(name.startswith(f"{path}.") for name in self.trained)
        }

    def __rich__(self) -> Group:
        from lora_lightning.injection.report import injection_table

        return injection_table(self)

    def _repr_mimebundle_(self, include: Sequence[str] = (), exclude: Sequence[str] = (), **_: Any) -> dict[str, str]:
        from rich.jupyter import JupyterMixin

        return JupyterMixin._repr_mimebundle_(cast(Any, self), include, exclude)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        share = self.trainable_parameters / max(self.total_parameters, 1)
        lines = [
            f"{type(self.method).__name__} on {len(self.layers)} layers: "
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train ({share:.2%})"
        ]
        if self.trained:
            lines.append(f"  fully trained: {', '.join(self.trained)}")
        lines += [f"  left out: {path} ({reason})" for path, reason in self.left_out.items()]
        lines += [f"  tied: {path} shares its weight with {', '.join(others)}" for path, others in self.tied.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


BYTES_PER_TRAINABLE = 16
"""float32 value, gradient and two moments of Adam."""


def injection_table(report: InjectionReport, density: float | None = None, base_bytes: int | None = None) -> Group:
    """What was adapted: layers by name and shape, and what trains.

    Args:
        report: what `inject` returned.
        density: fraction of the factors' entries that a sparsity schedule leaves, or None.
        base_bytes: memory of the frozen weights, or None.
    """
    table = Table(title=f"{type(report.method).__name__}: {len(report.layers)} layers adapted", title_justify="left")
    for column in ("layer", "count", "kind", "inputs", "outputs"):
        table.add_column(column, justify="left" if column in ("layer", "kind") else "right")
    kinds = Counter((_name(path), *shape) for path, shape in report.layers.items())
    for (name, kind, d_in, d_out), count in kinds.items():
        table.add_row(name, str(count), kind, str(d_in), str(d_out))
    share = report.trainable_parameters / max(1, report.total_parameters)
    settings = ", ".join(f"{field.name}={getattr(report.method, field.name)}" for field in fields(report.method))
    lines = [f"settings    {settings}"]
    lines += [f"trainable   {report.trainable_parameters:,} of {report.total_parameters:,} parameters ({share:.2%})"]
    if report.trained:
        lines.append(f"fully trained {', '.join(sorted(set(map(_owner, report.trained))))}")
    if density is not None:
        lines.append(f"density     {100 * density:.3g} % of the factors' entries at the end")
    if base_bytes is not None:
        training = report.trainable_parameters * BYTES_PER_TRAINABLE
        sizes = f"{base_bytes / 1e6:.0f} MB weights + {training / 1e6:.0f} MB training state"
        lines.append(f"memory      {sizes}, activations on top")
    lines += [f"left out    {path} ({reason})" for path, reason in report.left_out.items()]
    lines += [f"tied        {path} shares its weight with {', '.join(to)}" for path, to in report.tied.items()]
    lines += [f"note        {note}" for note in report.notes]
    return Group(table, Text("\n".join(lines)))


def _owner(name: str) -> str:
    """The module that a parameter belongs to; rows of new tokens, which are a part of one, by their own name."""
    return name if name.endswith(".new_rows") else name.rpartition(".")[0]


def _name(path: str) -> str:
    """The last two names of a path, numbers left out."""
    return ".".join([part for part in path.split(".") if not part.isdigit()][-2:]) or path
