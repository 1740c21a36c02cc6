"""A paragraph of documentation with what follows it, and what follows another one: prompt, chosen, rejected, name."""

from __future__ import annotations

import random

import datasets

from ll_demo.pairs import table as pairs


def table() -> datasets.Dataset:
    """The rejected paragraph is of another docstring, drawn from a fixed seed."""
    rows = pairs()
    others = list(range(len(rows)))
    random.Random(0).shuffle(others)
    place = {row: n for n, row in enumerate(others)}
    rejected = [rows["positive"][others[(place[row] + 1) % len(rows)]] for row in range(len(rows))]
    return datasets.Dataset.from_dict(
        {
            "prompt": rows["anchor"][:],
            "chosen": rows["positive"][:],
            "rejected": rejected,
            "name": rows["name"][:],
        }
    )
