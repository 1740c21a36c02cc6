"""Tables of plugins that need no file and no network: `builtin:NAME` wherever a data module takes a source."""

from __future__ import annotations

import importlib
from functools import cache

import datasets

from lora_lightning.errors import DataError, did_you_mean
from lora_lightning.plugins import registry

PREFIX = "builtin:"


def builtin_table(source: str, what: str) -> datasets.Dataset:
    """The table that `source`, "builtin:NAME", means; made once a process.

    Args:
        source: The source.
        what: Setting and value, for the message.

    Raises:
        DataError: there is no such table, with the nearest, or its plugin returned something else.
    """
    name, tables = source.removeprefix(PREFIX), registry().tables
    if name not in tables:
        known = f"Built in: {', '.join(tables) or 'none'}.{registry().explain_absent()}"
        raise DataError(f"{what}; there is no such table.{did_you_mean(name, tables)} {known}")
    table = _made(tables[name])
    if not isinstance(table, datasets.Dataset):
        raise DataError(f"{what}; {tables[name]} returned {table!r}, which is no datasets.Dataset.")
    return table


@cache
def _made(path: str) -> object:
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)()
