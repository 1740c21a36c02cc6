"""What README.md says of runs on two processes is what `test_sharded_runs.py` takes."""

from __future__ import annotations

from pathlib import Path

from sharded_cases import table

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_table_is_fresh():
    told = README.read_text().split("<!-- processes -->\n")[1].split("\n<!-- /processes -->")[0]
    assert told == table()
