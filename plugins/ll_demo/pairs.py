"""Two paragraphs of one docstring: anchor (its first paragraph), positive (its second), name."""

from __future__ import annotations

import datasets

from ll_demo.documented import documented
from lora_lightning.data.sources.splits import folded

FEWEST = 30
"""Characters of a paragraph."""


def table() -> datasets.Dataset:
    """Pairs in which neither text stands twice, so that the other pairs of a batch are true negatives."""
    seen: set[str] = set()
    rows: list[tuple[str, str, str]] = []
    for entry in documented():
        pair = entry.paragraphs[:2]
        if len(pair) < 2 or min(map(len, pair)) < FEWEST or not seen.isdisjoint(map(folded, pair)):
            continue
        seen.update(map(folded, pair))
        rows.append((pair[0], pair[1], entry.name))
    anchors, positives, names = zip(*rows, strict=True)
    return datasets.Dataset.from_dict({"anchor": anchors, "positive": positives, "name": names})
