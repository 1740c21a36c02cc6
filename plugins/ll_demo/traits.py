"""Documentation of functions and classes with what their syntax tree says of them: text, labels, name.

The labels (`TRAITS`) come from the code alone; a text tells some of them in words and only hints at others.
"""

from __future__ import annotations

import datasets

from ll_demo.documented import documented

FEWEST, MOST = 20, 400
"""Characters of a text."""


def table() -> datasets.Dataset:
    """First paragraphs of docstrings; one that stands twice is taken once."""
    rows: dict[str, tuple[list[str], str]] = {}
    for entry in documented():
        text = entry.paragraphs[0]
        if FEWEST <= len(text) <= MOST:
            rows.setdefault(text, (sorted(entry.traits), entry.name))
    return datasets.Dataset.from_dict(
        {
            "text": list(rows),
            "labels": [labels for labels, _ in rows.values()],
            "name": [name for _, name in rows.values()],
        }
    )
