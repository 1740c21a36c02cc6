"""Conversations about days of the week, of which later answers depend on earlier ones: messages.

Drawn from a fixed seed.
"""

from __future__ import annotations

import random

import datasets

from ll_demo.dates import DAYS

ROWS = 4000
Turns = list[dict[str, str]]


def table() -> datasets.Dataset:
    """Any day and direction as often as another."""
    draw = random.Random(0)
    return datasets.Dataset.from_dict({"messages": [conversation(draw) for _ in range(ROWS)]})


def conversation(draw: random.Random) -> Turns:
    """A question, and two about the answer before."""
    day, turns = draw.randrange(len(DAYS)), [_turn("system", "Answer with a day.")]
    for asked in (f"What day comes {{}} {DAYS[day]}?", "And {} that?", "And {} that?"):
        after = draw.random() < 0.5
        day = (day + (1 if after else -1)) % len(DAYS)
        turns.append(_turn("user", asked.format("after" if after else "before")))
        turns.append(_turn("assistant", f"{DAYS[day]}."))
    return turns


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
