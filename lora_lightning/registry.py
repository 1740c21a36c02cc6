"""What plugins have brought: methods, classes, verbs and export formats, and why a plugin failed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pluggy

from lora_lightning import hookspecs
from lora_lightning.errors import (
    DuplicateMethodError,
    PluginError,
    UnknownMethodError,
    did_you_mean,
)
from lora_lightning.methods import Method

TRAINING_VERBS = ("fit", "validate", "test", "predict")
LIGHT_VERBS = (
    "methods",
    "show",
    "cite",
    "targets",
    "inspect-data",
    "estimate",
    "doctor",
    "export",
    "new-plugin",
    "schema",
    "completion",
)

FORMATS = {  # core's; `Registry.formats` has those of plugins too
    "delta": "lora_lightning.exporters.delta",
    "merged": "lora_lightning.exporters.merged",
    "peft": "lora_lightning.exporters.peft.write",
}


@dataclass(frozen=True)
class Provider:
    """Who provides a method."""

    plugin: str
    package: str
    version: str


@dataclass
class Registry:
    """Loaded plugins and what they provide."""

    methods: dict[str, type[Method]] = field(default_factory=dict)
    providers: dict[str, Provider] = field(default_factory=dict)
    """Provider by method name."""
    failed: dict[str, BaseException] = field(default_factory=dict)
    """Cause by plugin name, for plugins that could not be loaded."""
    blocked: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Method names by blocked plugin; empty where they are not known without importing it."""
    duplicates: dict[str, DuplicateMethodError] = field(default_factory=dict)
    """What to raise for a name that two plugins provide."""
    modules: dict[str, str] = field(default_factory=dict)
    """Import path by blocked plugin; nothing from it may be used."""
    announced: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Plugin and hook by the name of an optimizer, callback or data module, as far as the plugins' sources tell."""
    commands: dict[str, str] = field(default_factory=dict)
    """Import path of the module by verb."""
    formats: dict[str, str] = field(default_factory=lambda: dict(FORMATS))
    """Import path of the module that writes it, by export format; core's first."""
    slow: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What a plugin imports while it is loaded though it takes seconds, by plugin; as far as nothing had before."""
    classes: dict[str, tuple[str, type[Any]]] = field(default_factory=dict)
    """Plugin and class by name, of optimizers, callbacks and data modules; filled by `load_classes`."""
    kinds: list[tuple[str, Callable[[Any], Any]]] | None = None
    """Plugin and function from a module to its base layer; filled by `base_layer_kinds`."""
    manager: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager(hookspecs.NAMESPACE))

    def method(self, name: str, where: str = "method") -> type[Method]:
        """The method class called `name`.

        Raises:
            UnknownMethodError: none is; the message lists the nearest, the installed, and every failed plugin.
            DuplicateMethodError: two plugins provide it.
        """
        if name in self.duplicates:
            raise self.duplicates[name]
        if name in self.methods:
            return self.methods[name]
        raise UnknownMethodError(f"{where}: {self.explain_unknown(name)}")

    def explain_unknown(self, name: str) -> str:
        """Why there is no method `name`, and what there is."""
        if name in self.duplicates:
            return str(self.duplicates[name])
        installed = f"Installed: {', '.join(sorted(self.methods)) or 'none'}."
        for plugin, names in self.blocked.items():
            if name in names:
                return f'method "{name}" comes from plugin {plugin}, which is blocked by -p no:{plugin}. {installed}'
        text = f'no method "{name}".{did_you_mean(name, self.methods)} {installed}'
        for plugin, names in self.blocked.items():
            provides = f" ({', '.join(names)})" if names else ""
            text += f" Plugin {plugin}{provides} is blocked by -p no:{plugin}."
        for plugin, cause in self.failed.items():
            text += f" Plugin {plugin} failed to load: {one_line(cause)}."
        return text

    def refuse_blocked(self, class_path: str, where: str) -> None:
        """Raise `PluginError` if the class `class_path` belongs to a blocked plugin, which a full path would reach."""
        for plugin, module in self.modules.items():
            if class_path.startswith(f"{module}."):
                raise PluginError(
                    f"{where}: {class_path} is part of plugin {plugin}, which is blocked by -p no:{plugin}."
                )

    def current_class_path(self, path: str) -> str:
        """Where the class is now that a config of 0.1 calls `path`; `path` itself for every other."""
        for former in ("strategies", "zero"):
            path = path.replace(f"lora_lightning.{former}.", "lora_lightning.training.strategies.")
        return path


def one_line(cause: BaseException) -> str:
    """One line for an exception, its class included."""
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}".rstrip(": ")


def arguments(owner: type) -> dict[str, inspect.Parameter]:
    """What a class takes by name; where it takes any keyword, what its base takes too."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found: dict[str, inspect.Parameter] = {}
    for cls in owner.__mro__:
        parameters = inspect.signature(cls).parameters
        found |= {name: p for name, p in parameters.items() if p.kind not in variadic and name not in found}
        if inspect.Parameter.VAR_KEYWORD not in {p.kind for p in parameters.values()}:
            break
    return found
