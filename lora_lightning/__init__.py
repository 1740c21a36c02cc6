"""Parameter-efficient fine-tuning on PyTorch Lightning, every method a plugin.

Names are resolved at first use, so that importing the package imports neither torch nor Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_lightning.hookspecs import hookimpl

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora_lightning import testing
    from lora_lightning.callbacks.inject import InjectAdapters
    from lora_lightning.checkpoint import load_adapter, save_adapter
    from lora_lightning.exporting import export, import_peft
    from lora_lightning.injection import (
        disable_adapters,
        eject,
        inject,
        iter_adapters,
        merge,
        set_active,
        set_trainable,
        unmerge,
    )
    from lora_lightning.methods import Method
    from lora_lightning.module import AdapterModule
    from lora_lightning.plugins import method
    from lora_lightning.vocabulary import add_tokens

_HOME = {
    "AdapterModule": "module",
    "InjectAdapters": "callbacks.inject",
    "Method": "methods",
    "add_tokens": "vocabulary",
    "disable_adapters": "injection",
    "eject": "injection",
    "export": "exporting",
    "import_peft": "exporting",
    "inject": "injection",
    "iter_adapters": "injection",
    "load_adapter": "checkpoint",
    "merge": "injection",
    "method": "plugins",
    "save_adapter": "checkpoint",
    "set_active": "injection",
    "set_trainable": "injection",
    "unmerge": "injection",
}

__all__ = [
    "AdapterModule",
    "InjectAdapters",
    "Method",
    "add_tokens",
    "disable_adapters",
    "eject",
    "export",
    "hookimpl",
    "import_peft",
    "inject",
    "iter_adapters",
    "load_adapter",
    "merge",
    "method",
    "save_adapter",
    "set_active",
    "set_trainable",
    "testing",
    "unmerge",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "testing":
            return importlib.import_module("lora_lightning.testing")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"lora_lightning.{_HOME[name]}"), name)

    def __dir__() -> list[str]:
        return sorted(__all__)
