"""The parts beside methods that a config can name: optimizers, callbacks, data modules, strategies.

Importing them takes torch and Lightning, so it is done when one is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from lora_lightning import plugins
from lora_lightning.cli.classes import named_classes
from lora_lightning.errors import PluginError
from lora_lightning.version import __version__

PACKAGE = "lora-lightning"


@dataclass(frozen=True)
class Part:
    """A class that a config can name.

    Attributes:
        cls: the class.
        kind: what it is, in lower case.
        setting: where a config names it.
        plugin: that brings it; empty for what comes with a library or core.
    """

    cls: type[Any]
    kind: str
    setting: str
    plugin: str = ""

    @property
    def provider(self) -> str:
        """The plugin, if one brings it, package and version."""
        if self.plugin:
            return f"{self.plugin}, from {' '.join(plugins.package_of(self.plugin))}"
        package = self.cls.__module__.partition(".")[0]
        return f"{PACKAGE} {__version__}" if package == "lora_lightning" else f"{package} {version(package)}"


def parts() -> dict[str, Part]:
    """Every part by its short name, ours before Lightning's and torch's."""
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.strategies import Strategy
    from torch.optim import Optimizer

    import lora_lightning.callbacks
    import lora_lightning.data
    import lora_lightning.training.strategies.sharded  # noqa: F401 - a class can be named once it is imported

    bases = {
        "optimizer": (Optimizer, "model.optimizer"),
        "callback": (Callback, "trainer.callbacks"),
        "data module": (LightningDataModule, "data"),
        "strategy": (Strategy, "trainer.strategy"),
    }
    known = plugins.registry()
    hooks = {"optimizers": Optimizer, "callbacks": Callback, "datamodules": LightningDataModule}
    plugins.load_classes(known, {f"lora_lightning_{hook}": base for hook, base in hooks.items()})
    found: dict[str, Part] = {}
    for kind, (base, setting) in bases.items():
        for name, cls in named_classes(base).items():
            if not _is_blocked(cls):
                found.setdefault(name, Part(cls, kind, setting, _plugin(name, cls)))
    return found


def _is_blocked(cls: type[Any]) -> bool:
    try:
        plugins.registry().refuse_blocked(f"{cls.__module__}.{cls.__name__}", "")
    except PluginError:
        return True
    return False


def _plugin(name: str, cls: type[Any]) -> str:
    plugin, given = plugins.registry().classes.get(name, ("", None))
    return plugin if given is cls else ""
