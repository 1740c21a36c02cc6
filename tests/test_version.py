"""One version: of the package, of the installed distribution, of what the command line says."""

from __future__ import annotations

import importlib.metadata

import lora_lightning
from lora_lightning.version import __version__


def test_there_is_one_version() -> None:
    assert lora_lightning.__version__ == __version__
    assert importlib.metadata.version("lora-lightning") == __version__
