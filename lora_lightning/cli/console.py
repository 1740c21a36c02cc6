"""Tables for the terminal; rich is imported when one is printed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 200
"""Columns where the output is no terminal, so that nothing is cut in a file."""


def console() -> Console:
    """Standard output: as wide as the terminal, or `PIPED_WIDTH`."""
    from rich.console import Console

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich calls it where it has caught one, and would exit

    return Ours(width=None if sys.stdout.isatty() else PIPED_WIDTH)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under bold headings; cells are plain text, brackets in them are no markup."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)
