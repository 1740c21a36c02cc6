"""Words to a run: the command line. `build` gives in Python what a command line describes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.cli.lightning import build

__all__ = ["build"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """`build`, whose module imports torch and Lightning, at its first use."""
        if name in __all__:
            return getattr(importlib.import_module("lora_lightning.cli.lightning"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
