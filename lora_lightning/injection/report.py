"""What `inject` did, for people: lines for `print`, a table for rich and notebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_lightning.adapters.base import Adapter, linked_modules
from lora_lightning.injection.records import AdapterRecord
from lora_lightning.injection.targets import Selection
from lora_lightning.methods import Method
from lora_lightning.models.anatomy import Anatomy
from lora_lightning.models.base_layers import count_numbers, kind_of
from lora_lightning.models.new_tokens import holds_rows
from lora_lightning.models.paths import inside


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
    """Fully trained base parameters, with their sizes."""
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
        """Skipped layers that are not fully trained either, and why."""
        owners = [name.rpartition(".")[0] for name in self.trained]
        return {path: why for path, why in self.skipped.items() if not any(inside(owner, path) for owner in owners)}

    @property
    def trainable_fraction(self) -> float:
        """Numbers that train, of all that the model holds."""
        return self.trainable_parameters / max(self.total_parameters, 1)

    def __rich__(self) -> Group:
        return injection_table(self)

    def _repr_mimebundle_(self, include: Sequence[str] = (), exclude: Sequence[str] = (), **_: Any) -> dict[str, str]:
        from rich.jupyter import JupyterMixin

        return JupyterMixin._repr_mimebundle_(cast(Any, self), include, exclude)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [
            f"{type(self.method).__name__} on {len(self.layers)} layers: "
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train "
            f"({self.trainable_fraction:.2%})"
        ]
        if self.trained:
            lines.append(f"  fully trained: {', '.join(self.trained)}")
        lines += [f"  left out: {path} ({reason})" for path, reason in self.left_out.items()]
        lines += [f"  tied: {path} shares its weight with {', '.join(others)}" for path, others in self.tied.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


SHOWN = 12
"""Names of fully trained modules in the table."""
BYTES_PER_TRAINABLE = 16
"""float32 value, gradient and two moments of Adam."""


def report_on(
    anatomy: Anatomy,
    name: str,
    record: AdapterRecord,
    adapters: Mapping[str, Adapter],
    selection: Selection,
    notes: Sequence[str] = (),
) -> InjectionReport:
    """What was injected.

    Args:
        anatomy: of the model as it was before.
        name: name of the adapter.
        record: what was noted on the model.
        adapters: the adapters by layer path; what they share counts once.
        selection: layers that they were put on, and layers that were left out.
        notes: what else a user should know.
    """
    own: dict[int, int] = {}
    for module in (*adapters.values(), *linked_modules(adapters.values())):
        own |= {id(parameter): parameter.numel() for parameter in module.parameters()}
    return InjectionReport(
        name=name,
        method=record.method,
        layers={path: (kind_of(base), base.d_in, base.d_out) for path, base in selection.layers.items()},
        adapter_parameters=sum(own.values()),
        trained={parameter: anatomy.model.get_parameter(parameter).numel() for parameter in record.trained},
        total_parameters=count_numbers(anatomy.parameters, anatomy.quantized) + sum(own.values()),
        skipped=selection.skipped,
        tied=selection.tied,
        notes=tuple(notes),
    )


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
    facts = _settings_and_counts(report)
    if density is not None:
        facts.append(("density", f"{density:.1%} of the factors' entries at the end"))
    if base_bytes is not None:
        training = report.trainable_parameters * BYTES_PER_TRAINABLE
        sizes = f"{base_bytes / 1e6:.0f} MB weights + {training / 1e6:.0f} MB training state"
        facts.append(("memory", f"{sizes}, activations on top"))
    facts += [("left out", f"{path} ({reason})") for path, reason in report.left_out.items()]
    facts += [("tied", f"{path} shares its weight with {', '.join(to)}") for path, to in report.tied.items()]
    facts += [("note", note) for note in report.notes]
    return Group(table, Text("\n".join(f"{label:<15}{text}" for label, text in facts)))


def _settings_and_counts(report: InjectionReport) -> list[tuple[str, str]]:
    given = {field.name: getattr(report.method, field.name) for field in fields(report.method)}
    settings = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    counts = f"{report.trainable_parameters:,} of {report.total_parameters:,} parameters"
    found = [("settings", settings), ("trainable", f"{counts} ({report.trainable_fraction:.2%})")]
    if report.trained:
        owners = sorted(set(map(_owner, report.trained)))
        more = [f"and {len(owners) - SHOWN} more"] if len(owners) > SHOWN + 1 else []
        found.append(("fully trained", ", ".join([*(owners[:SHOWN] if more else owners), *more])))
    return found


def _owner(name: str) -> str:
    """The module that a parameter belongs to; rows of tokens, which are a part of one, by their own name."""
    return name if holds_rows(name) else name.rpartition(".")[0]


def _name(path: str) -> str:
    """The last two names of a path, numbers left out."""
    return ".".join([part for part in path.split(".") if not part.isdigit()][-2:]) or path
