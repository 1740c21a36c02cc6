"""Two paragraphs of documentation and how near their subjects are: first, second, score.

1 for two of one docstring, 2/3 for two of one class or module, 1/3 for two of one package, 0 for others.
"""

from __future__ import annotations

import random
from collections import defaultdict

import datasets

from ll_demo.documented import Documented, documented

FEWEST = 30
"""Characters of a paragraph."""


def table() -> datasets.Dataset:
    """Each docstring of two paragraphs gives one pair; the kind of pair is drawn from a fixed seed."""
    entries = [e for e in documented() if len(e.paragraphs) > 1 and min(map(len, e.paragraphs[:2])) >= FEWEST]
    near: dict[str, list[Documented]] = defaultdict(list)
    for entry in entries:
        for place in {_owner(entry), _package(entry)}:
            near[place].append(entry)
    draw, rows = random.Random(0), []
    for number, entry in enumerate(entries):
        others = (
            [entry],
            [e for e in near[_owner(entry)] if e is not entry],
            [e for e in near[_package(entry)] if _owner(e) != _owner(entry)],
            entries,
        )[number % 4]
        if others:
            other = draw.choice(others)
            rows.append((entry.paragraphs[0], other.paragraphs[1], nearness(entry, other)))
    first, second, score = zip(*rows, strict=True)
    return datasets.Dataset.from_dict({"first": first, "second": second, "score": score})


def nearness(one: Documented, other: Documented) -> float:
    """The score of a pair."""
    shared = (one is other, _owner(one) == _owner(other), _package(one) == _package(other))
    return sum(shared) / 3


def _owner(entry: Documented) -> str:
    return entry.name.rpartition(".")[0]


def _package(entry: Documented) -> str:
    return entry.name.partition(".")[0]
