"""Class lookup: the classes behind a setting's type, their short names, parameters, and who brings them.

Of imported classes those are found that jsonargparse finds: subclasses. Methods and components come from the registry.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

from lora_lightning import plugins
from lora_lightning.methods import Method
from lora_lightning.registry import Component, arguments
from lora_lightning.start_values import Start
from lora_lightning.version import __version__


def short_names(bases: Sequence[type]) -> list[str]:
    """Short names that a class-valued setting takes."""
    if takes_method(bases):
        return sorted(plugins.registry().methods)
    return sorted({name for base in bases for name in named_classes(base)})


def named_classes(base: type) -> dict[str, type]:
    """Imported subclasses that a config can name, by short name; of one name the one that keeps it."""
    found = [cls for cls in plugins.subclasses(base) if _can_be_named(cls)]
    found.sort(key=lambda cls: (plugins.keeps_name(cls), cls.__module__.startswith("lora_lightning")))
    return {cls.__name__: cls for cls in found}


def takes_method(bases: Sequence[type]) -> bool:
    """Whether a setting of these classes is a method."""
    return any(issubclass(base, Method) for base in bases)


def _can_be_named(cls: type) -> bool:
    return not (cls.__name__.startswith("_") or "<locals>" in cls.__qualname__ or inspect.isabstract(cls))


def noun(bases: Sequence[type]) -> str:
    """The first base in lower-case words: `LightningDataModule` is a "data module"."""
    name = bases[0].__name__.removeprefix("Lightning") if bases else "class"
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).lower()


def hint_of(trail: Sequence[tuple[str, str]], parser: argparse.ArgumentParser) -> object:
    """The type of the setting at the end of `trail`: keys and, before a key inside a class, the class."""
    hint: object = None
    owner: type | None = None
    for kind, name in trail:
        if kind == "class":
            owner = imported_class(name)
        elif owner is None:
            hint = next(
                (getattr(action, "_typehint", None) for action in _arguments(parser) if action.dest == name), None
            )
        else:
            hint = parameter_types(owner).get(name)
    return hint


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Arguments of a parser and of its verbs; errors found at the very end come from the outermost parser."""
    for action in parser._actions:
        yield action
        if isinstance(action.choices, dict):
            for verb in action.choices.values():
                yield from _arguments(verb)


def parameter_types(owner: type) -> dict[str, Any]:
    """Types by the names that a class and its bases take, as far as they can be told."""
    found: dict[str, Any] = {}
    for base in reversed(owner.__mro__):
        init = vars(base).get("__init__")
        if init is None or base is object:
            continue
        try:
            found |= typing.get_type_hints(init)
        except (NameError, TypeError, AttributeError):  # a name of another module, or imported for type checking only
            found |= _fields_of(base) or dict(getattr(init, "__annotations__", {}))
    return found


def _fields_of(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields, each found in the module of its class; empty where one is not there."""
    try:
        return typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
    except NameError:
        return {}


def bases_of(hint: object) -> list[type]:
    """The classes whose subclasses a setting of type `hint` takes."""
    if isinstance(hint, str):
        return [base for base in (Method, Start) if re.search(rf"\b{base.__name__}\b", hint)]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Callable:
        return bases_of(arguments[-1])
    if arguments:
        return [base for argument in arguments for base in bases_of(argument)]
    return [hint] if isinstance(hint, type) and hint.__module__ not in ("builtins", "types") else []


def imported_class(path: str) -> type | None:
    """An imported class."""
    module, _, name = path.rpartition(".")
    cls: object = getattr(sys.modules.get(module), name, None)
    return cls if isinstance(cls, type) else None


def parameters_of(owner: type) -> list[str]:
    """Names that a class takes, those it hands on to its bases included; what no config gives is left out."""
    return [name for name in arguments(owner) if name not in ("params", "optimizer")]


def load_components() -> None:
    """Import the optimizers, callbacks and data modules of plugins: each can then be named, or its failure is known."""
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.callbacks import Callback
    from torch.optim import Optimizer

    bases = {"optimizers": Optimizer, "callbacks": Callback, "datamodules": LightningDataModule}
    plugins.load_classes(plugins.registry(), {f"lora_lightning_{hook}": base for hook, base in bases.items()})


def provider_of(component: Component) -> str:
    """The plugin, if one brings it, package and version."""
    if component.plugin:
        return f"{component.plugin}, from {' '.join(plugins.package_of(component.plugin))}"
    package = component.path.partition(".")[0]
    return f"lora-lightning {__version__}" if package == "lora_lightning" else f"{package} {version(package)}"
