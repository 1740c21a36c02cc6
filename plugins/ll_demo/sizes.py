"""Documentation of functions with the size of their code: text, size (log2 of its statements), name."""

from __future__ import annotations

import math

import datasets

from ll_demo.documented import documented

FEWEST, MOST = 20, 400
"""Characters of a text."""


def table() -> datasets.Dataset:
    """First paragraphs of functions that do something; one that stands twice is taken once."""
    rows: dict[str, tuple[float, str]] = {}
    for entry in documented():
        text = entry.paragraphs[0]
        if entry.statements and FEWEST <= len(text) <= MOST:
            rows.setdefault(text, (math.log2(entry.statements), entry.name))
    sizes, names = zip(*rows.values(), strict=True)
    return datasets.Dataset.from_dict({"text": list(rows), "size": sizes, "name": names})
