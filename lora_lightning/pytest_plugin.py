"""What pytest is told wherever this library is installed: the mark that the contract suite uses.

Every pytest run of such an environment imports this module, so it imports neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

MARKERS = ("slow: takes minutes, or compiles every kind of layer; leave it out with -m 'not slow'",)
"""Marks of `lora_lightning.testing`, as an ini file lists them."""


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks, so that `--strict-markers` accepts the suite in a package that configures nothing."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
