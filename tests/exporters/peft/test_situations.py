"""The table of docs/export.md: each of peft's situations is right, refused or missing, and never wrong."""

from __future__ import annotations

import pytest
from pages import as_table, rows, section
from peft_situations import PAGE, PART, SITUATIONS, outcome

TOLD = {row[0]: row[1:] for row in rows(section(PAGE, PART))[1:]}


def test_the_table_lists_every_situation() -> None:
    """Else write it anew: `python tests/peft_situations.py`."""
    assert list(TOLD) == list(SITUATIONS)


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_situation_is_as_the_table_says(name: str) -> None:
    found = rows(as_table([["situation", "outcome", "what is said"], [name, *outcome(SITUATIONS[name])]]))[1]
    assert TOLD[name] == found[1:]
