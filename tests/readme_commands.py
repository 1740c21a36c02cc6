"""The two commands of the README, read out of it: `python tests/readme_commands.py run|test`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def commands() -> dict[str, str]:
    """The line that runs the main job, and the line that runs the tests."""
    found = re.findall(r"^    (pip install .*)$|^(pip install .*)$", README.read_text(), flags=re.M)
    lines = [line for pair in found for line in pair if line and "&&" in line]
    return {"run": lines[0], "test": lines[1]}


if __name__ == "__main__":
    print(commands()[sys.argv[1]])
