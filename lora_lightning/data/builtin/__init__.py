"""Tables that need no file and no network: `builtin:NAME` wherever a data module takes a source.

They are made from the running interpreter's standard library, or drawn from a fixed seed. A config that uses one shows
what the columns of a file of one's own must be like.
"""

from __future__ import annotations

import importlib
from functools import cache

import datasets

from lora_lightning.errors import DataError, did_you_mean

PREFIX = "builtin:"

TABLES: dict[str, str] = {
    "python-docs": "docs",
    "python-words": "words",
    "python-traits": "traits",
    "python-pairs": "pairs",
    "python-kin": "kin",
    "python-sizes": "sizes",
    "dates": "dates",
    "weekdays": "weekdays",
    "shapes": "shapes",
}
"""Module of this package, with a function `table()`, by name."""


def builtin_table(source: str, what: str) -> datasets.Dataset:
    """The table that `source`, "builtin:NAME", means; made once a process.

    Args:
        source: The source.
        what: Setting and value, for the message.

    Raises:
        DataError: there is no such table, with the nearest.
    """
    name = source.removeprefix(PREFIX)
    if name not in TABLES:
        raise DataError(f"{what}; there is no such table.{did_you_mean(name, TABLES)} Built in: {', '.join(TABLES)}.")
    return _made(name)


@cache
def _made(name: str) -> datasets.Dataset:
    table: datasets.Dataset = importlib.import_module(f"{__name__}.{TABLES[name]}").table()
    return table
