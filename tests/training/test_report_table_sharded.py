"""What docs/processes.md says of runs on two processes is what `test_sharded_runs.py` takes."""

from __future__ import annotations

from pages import DOCS, section
from sharded_cases import table


def test_the_table_is_fresh():
    assert section(DOCS / "processes.md", "processes").strip() == table().strip()
