"""Dates as people write them with two ISO dates, of which one is right: prompt, chosen, rejected.

Drawn from a fixed seed.
"""

from __future__ import annotations

import datetime
import random

import datasets

from ll_demo.dates import FIRST, FORMS, LAST, written

ROWS = 6000


def table() -> datasets.Dataset:
    """Different prompts only."""
    draw = random.Random(0)
    days = (LAST - FIRST).days
    rows: dict[str, tuple[str, str]] = {}
    while len(rows) < ROWS:
        date = FIRST + datetime.timedelta(days=draw.randrange(days + 1))
        text = written(date, draw.randrange(FORMS))
        rows.setdefault(text, (date.isoformat(), changed(date, draw).isoformat()))
    chosen, rejected = zip(*rows.values(), strict=True)
    return datasets.Dataset.from_dict({"prompt": list(rows), "chosen": chosen, "rejected": rejected})


def changed(date: datetime.date, draw: random.Random) -> datetime.date:
    """A date with another day, month or year, and the other two the same."""
    while True:
        field = draw.choice(("day", "month", "year"))
        value = {"day": draw.randint(1, 28), "month": draw.randint(1, 12), "year": draw.randint(FIRST.year, LAST.year)}
        try:
            other = date.replace(**{field: value[field]})
        except ValueError:  # such as 31 April
            continue
        if other != date:
            return other
