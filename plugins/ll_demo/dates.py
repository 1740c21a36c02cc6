"""Dates as people write them, and as ISO 8601 does: source, target. Drawn from a fixed seed."""

from __future__ import annotations

import datetime
import random

import datasets

ROWS = 6000
FORMS = 6
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
FIRST, LAST = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)


def table() -> datasets.Dataset:
    """Different texts only."""
    draw = random.Random(0)
    days = (LAST - FIRST).days
    rows: dict[str, str] = {}
    while len(rows) < ROWS:
        date = FIRST + datetime.timedelta(days=draw.randrange(days + 1))
        rows.setdefault(written(date, draw.randrange(FORMS)), date.isoformat())
    return datasets.Dataset.from_dict({"source": list(rows), "target": list(rows.values())})


def written(date: datetime.date, form: int) -> str:
    """The date in one of several forms, in English whatever the machine's language is."""
    month, day = MONTHS[date.month - 1], DAYS[date.weekday()]
    suffix = "th" if date.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10, "th")
    return (
        f"{month} {date.day}, {date.year}",
        f"{date.day} {month} {date.year}",
        f"{day}, {date.day} {month[:3]} {date.year}",
        f"the {date.day}{suffix} of {month} {date.year}",
        f"{date.day}.{date.month}.{date.year}",
        f"{date.month}/{date.day}/{date.year}",
    )[form]
