"""Function documentation with what the function's code does: text, labels, name.

Labels come from the code alone: it returns a value, raises, loops, branches, catches exceptions, is a method. A text
tells some of them in words and only hints at others.
"""

from __future__ import annotations

import datasets

from lora_lightning.data.builtin.documented import documented

FEWEST, MOST = 20, 400
"""Characters of a text."""


def table() -> datasets.Dataset:
    """First paragraphs of functions whose code has at least one trait; a text that stands twice is taken once."""
    rows: dict[str, tuple[list[str], str]] = {}
    for entry in documented():
        text = entry.paragraphs[0]
        if entry.traits and FEWEST <= len(text) <= MOST:
            rows.setdefault(text, (sorted(entry.traits), entry.name))
    return datasets.Dataset.from_dict(
        {
            "text": list(rows),
            "labels": [labels for labels, _ in rows.values()],
            "name": [name for _, name in rows.values()],
        }
    )
