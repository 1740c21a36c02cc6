"""What UpdateSpectrum writes, read back: ranks by step and layer.

{"format": ..., "fraction": 0.9, "label": "LoRA", "records": [{"step": 25, "layers": {path: {"effective_rank", ...}}}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ll_weight_change.records import index_of, kinds_of
from lora_lightning.storage.recorded import content_of

FORMAT = "lora_lightning update spectrum 1"
FILENAME = "spectrum.json"


@dataclass(frozen=True)
class Rank:
    """One layer at one step."""

    step: int
    kind: str
    """Last name of the path, numbers left out, such as "query"."""
    index: int
    """Number of the layer's block; layers without one are numbered in their order."""
    effective: float
    stable: float
    largest: int
    """What the layer's size allows."""


@dataclass(frozen=True)
class Spectra:
    """One recorded run."""

    label: str
    fraction: float
    ranks: tuple[Rank, ...]

    def kinds(self) -> list[str]:
        """Module types, in the order of the model."""
        return list(dict.fromkeys(rank.kind for rank in self.ranks))

    def steps(self) -> list[int]:
        """Measured steps, in order."""
        return sorted({rank.step for rank in self.ranks})

    def last(self, kind: str) -> list[Rank]:
        """Ranks of a module type at the last step, by layer."""
        step = self.steps()[-1]
        return sorted((r for r in self.ranks if r.kind == kind and r.step == step), key=lambda rank: rank.index)

    def mean(self, kind: str, step: int) -> float:
        """Mean effective rank of a module type."""
        values = [rank.effective for rank in self.ranks if rank.kind == kind and rank.step == step]
        return sum(values) / len(values)


def read(path: Path) -> Spectra:
    """The run that a file holds.

    Raises:
        DataError: missing, damaged, or another kind of file.
    """
    return content_of(path, FORMAT, "UpdateSpectrum", FILENAME, _spectra)


def _spectra(content: Mapping[str, Any]) -> Spectra:
    records: Sequence[Mapping[str, Any]] = content["records"]
    kinds = kinds_of(list(records[0]["layers"]))
    ranks = [
        Rank(
            record["step"], kinds[path], index_of(path, kinds), float(values["effective_rank"]),
            float(values["stable_rank"]), int(values["largest_rank"]),
        )
        for record in records
        for path, values in record["layers"].items()
    ]  # fmt: skip
    return Spectra(str(content["label"]), float(content["fraction"]), tuple(ranks))
