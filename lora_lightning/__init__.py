"""Parameter-efficient fine-tuning on PyTorch Lightning, every method a plugin.

Names are resolved at first use, so that importing the package imports neither torch nor Lightning.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from lora_lightning.hookspecs import hookimpl
from lora_lightning.version import __version__ as __version__

if TYPE_CHECKING:
    from lora_lightning import testing
    from lora_lightning.callbacks.inject import InjectAdapters
    from lora_lightning.exporters.export import export, import_peft
    from lora_lightning.injection.inject import inject
    from lora_lightning.injection.merge_model import eject, merge, unmerge
    from lora_lightning.injection.probe import Probe
    from lora_lightning.injection.records import iter_adapters
    from lora_lightning.injection.switches import disable_adapters, set_active, set_trainable
    from lora_lightning.methods import Method
    from lora_lightning.models.new_tokens import add_tokens
    from lora_lightning.plugins import method
    from lora_lightning.storage.compose import compose
    from lora_lightning.storage.folder import save_adapter
    from lora_lightning.storage.load import load_adapter
    from lora_lightning.training.module import AdapterModule

_HOME = {
    "AdapterModule": "training.module",
    "InjectAdapters": "callbacks.inject",
    "Method": "methods",
    "Probe": "injection.probe",
    "add_tokens": "models.new_tokens",
    "compose": "storage.compose",
    "disable_adapters": "injection.switches",
    "eject": "injection.merge_model",
    "export": "exporters.export",
    "import_peft": "exporters.export",
    "inject": "injection.inject",
    "iter_adapters": "injection.records",
    "load_adapter": "storage.load",
    "merge": "injection.merge_model",
    "method": "plugins",
    "save_adapter": "storage.folder",
    "set_active": "injection.switches",
    "set_trainable": "injection.switches",
    "unmerge": "injection.merge_model",
}

__all__ = [
    "AdapterModule",
    "InjectAdapters",
    "Method",
    "Probe",
    "add_tokens",
    "compose",
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

    class _Former:
        """Finds modules by their names of 0.1. It is asked last, so it costs nothing where a module is found."""

        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:  # noqa: ARG004 - what importers are asked
            """How to import `name`; None where it never was a module of ours."""
            if not name.startswith(f"{__name__}."):
                return None
            return importlib.import_module("lora_lightning.registry").former_spec(name)

    sys.meta_path.append(_Former)
