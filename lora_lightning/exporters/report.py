"""What an export did, for people and for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Origin:
    """Where an adapter and its base model lie on the disk."""

    adapter: Path
    base: str
    """A folder or a name of a pretrained model."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a format's writer did inside the folder it was given.

    Attributes:
        kind: how exact the route is: the method's export class, "merged", or "truncated SVD".
        layers: number of adapted layers in the export.
        difference: largest absolute difference found on reading back; None where nothing was verified.
        verified_by: who opened what was written, and what was compared; "" where nobody could.
        not_run: why nobody could.
        discarded: layer path to the fraction of the update's energy (sum of squares) that a truncation left out.
        notes: further lines for whoever reads the report.
    """

    kind: str
    layers: int
    difference: float | None
    verified_by: str = "reading back"
    not_run: str = ""
    discarded: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExportReport(Written):
    """What `export` wrote."""

    format: str
    directory: Path
    files: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f'{self.format} ({self.kind}): {self.layers} layers to "{self.directory}": {", ".join(self.files)}']
        if self.difference is None:
            lines.append("  not verified: verify=False")
        elif self.verified_by:
            lines.append(f"  verified by {self.verified_by}; largest difference {self.difference:.3g}")
        else:
            lines.append(f"  read back tensor by tensor, but not run: {self.not_run}")
        if self.discarded:
            worst = max(self.discarded, key=lambda path: self.discarded[path])
            lines.append(
                f"  truncated: {len(self.discarded)} layers lose part of their update, most {worst} "
                f"({self.discarded[worst]:.3%} of its energy)"
            )
            lines += [f"    {path}: {fraction:.3%}" for path, fraction in self.discarded.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])
