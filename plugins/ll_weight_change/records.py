"""The file that the recorder writes and the analysis reads: dM and dD by step and layer.

{"format": ..., "label": "DoRA", "axis": "out", "records": [{"step": 25, "layers": {path: {"dM", "dD", "skipped"}}}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.storage.recorded import content_of

FORMAT = "lora_lightning weight decomposition 1"
FILENAME = "decomposition.json"


@dataclass(frozen=True)
class Point:
    """One layer at one checkpoint."""

    step: int
    kind: str
    """Last name of the path, numbers left out, such as "query"."""
    index: int
    """Number of the layer's block; layers without one are numbered in their order."""
    magnitude: float
    """dM."""
    direction: float
    """dD."""


@dataclass(frozen=True)
class Run:
    """One recorded run."""

    label: str
    axis: str
    points: tuple[Point, ...]
    skipped: int
    """Zero vectors at the last checkpoint, over all layers."""

    def kinds(self) -> list[str]:
        """Module types, in the order of the model."""
        return list(dict.fromkeys(point.kind for point in self.points))

    def of(self, kind: str) -> list[Point]:
        """Points of one module type."""
        return [point for point in self.points if point.kind == kind]


def read(path: Path) -> Run:
    """The run that a file, or the run folder around it, holds.

    Raises:
        DataError: missing, damaged, or another kind of file.
    """
    return content_of(path / FILENAME if path.is_dir() else path, FORMAT, "WeightDecomposition", FILENAME, _run)


def _run(content: dict[str, Any]) -> Run:
    records = content["records"]
    kinds = kinds_of(list(records[0]["layers"]))
    points = [
        Point(record["step"], kinds[path], index_of(path, kinds), float(values["dM"]), float(values["dD"]))
        for record in records
        for path, values in record["layers"].items()
        if values["dM"] is not None  # no vector of the layer had a direction
    ]
    skipped = sum(values["skipped"] for values in records[-1]["layers"].values())
    return Run(str(content["label"]), str(content["axis"]), tuple(points), skipped)


def kinds_of(paths: Sequence[str]) -> dict[str, str]:
    """Module type of each layer: its path without numbers, cut to the end that tells it from all others.

    "query" for "layer.0.attention.query", but "attention.output" where there is an "mlp.output" too.
    """
    names = {path: tuple(name for name in path.split(".") if not name.isdigit()) for path in paths}
    return {path: ".".join(_shortest(own, set(names.values()))) or "layer" for path, own in names.items()}


def _shortest(own: tuple[str, ...], every: set[tuple[str, ...]]) -> tuple[str, ...]:
    for length in range(1, len(own)):
        if [other for other in every if other[-length:] == own[-length:]] == [own]:
            return own[-length:]
    return own


def index_of(path: str, kinds: Mapping[str, str]) -> int:
    """The first number in a path; without one, the place among layers of its kind."""
    numbers = [int(name) for name in path.split(".") if name.isdigit()]
    return numbers[0] if numbers else [other for other in kinds if kinds[other] == kinds[path]].index(path)
