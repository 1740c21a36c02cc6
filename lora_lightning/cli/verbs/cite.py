"""Print BibTeX for every method and optimizer of a plugin that configs name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_lightning.cli.cards import fields_of
from lora_lightning.cli.configs import find_config
from lora_lightning.errors import SettingsError
from lora_lightning.methods import Method
from lora_lightning.plugins import load_classes, registry
from lora_lightning.registry import TRAINING_VERBS

_WRAPS = re.compile(rf"\b{Method.__name__}\b")
"""In the type of a field that holds a method."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configs."""
    parser.add_argument("configs", metavar="CONFIG", nargs="+", help="config files, or names as --config takes them")


def run(args: argparse.Namespace) -> int:
    """Print each entry once, in the order in which the methods are named.

    Raises:
        SettingsError: a config that cannot be read.
        UnknownMethodError: a config names a method that is not installed.
    """
    methods: list[type[Any]] = [method for config in args.configs for method in methods_in(config)]
    found = methods + [cls for config in args.configs for cls in classes_in(config)]
    if not found:
        print(f"{', '.join(args.configs)}: no method is named, nothing to cite.")
        return 0
    named = ((cls.__name__, getattr(cls, "bibtex", "")) for cls in found)
    entries = (bibtex or f"% {name}: its plugin gives no BibTeX entry." for name, bibtex in named)
    print("\n\n".join(dict.fromkeys(entries)))
    return 0


def classes_in(config: str) -> Iterator[type[Any]]:
    """Optimizers of plugins that a config names; torch is imported only where there is one."""
    brought, hook = registry().components, "lora_lightning_optimizers"
    names = [name for name in _names(_read(config)) if name in brought and brought[name].kind == "optimizer"]
    if names:
        from torch.optim import Optimizer

        load_classes(registry(), {hook: Optimizer})
        yield from (registry().classes[name][1] for name in names if name in registry().classes)


def _names(value: object) -> Iterator[str]:
    """Last parts of all class paths, and of short names under a key `optimizer` or `inner`."""
    if isinstance(value, list):
        for element in value:
            yield from _names(element)
    elif isinstance(value, Mapping):
        for key, element in value.items():
            if isinstance(element, str) and key in ("class_path", "optimizer", "inner"):
                yield element.rpartition(".")[2]
            yield from _names(element)


def methods_in(config: str) -> Iterator[type[Method]]:
    """Methods that a config names, wrapped ones after those that wrap them."""
    settings = _read(config)
    for section in (settings, *(settings[verb] for verb in TRAINING_VERBS if isinstance(settings.get(verb), Mapping))):
        model = section.get("model")
        if isinstance(model, Mapping):
            model = model.get("init_args", model)
            yield from _methods(model.get("method"), f"{config}: model.method")
        yield from _elsewhere({key: value for key, value in section.items() if key not in ("model", *TRAINING_VERBS)})


def _read(config: str) -> Mapping[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(Path(find_config(config)).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SettingsError(f"{config}: not valid YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{config}: cannot be read: {error}") from error
    if not isinstance(settings or {}, Mapping):
        raise SettingsError(f"{config}: a config must be a mapping of settings.")
    return settings or {}


def _methods(value: object, where: str) -> Iterator[type[Method]]:
    """The method that `value` gives, and those in its fields."""
    if isinstance(value, list):
        for i, element in enumerate(value):
            yield from _methods(element, f"{where}[{i}]")
        return
    name = value.get("class_path") if isinstance(value, Mapping) else value
    candidates = list(registry().methods.values())
    if isinstance(name, str):
        candidates = [registry().method(name.rpartition(".")[2], where)]
        yield candidates[0]
    fields = (value.get("init_args", value) or {}) if isinstance(value, Mapping) else {}
    wrapped = {card.name for method in candidates for card in fields_of(method) if _WRAPS.search(card.type)}
    for field in fields:
        if field in wrapped:
            yield from _methods(fields[field], f"{where}.{field}")


def _elsewhere(value: object) -> Iterator[type[Method]]:
    """Methods given to callbacks and the like: under a key `method`, or by class path."""
    if isinstance(value, list):
        for element in value:
            yield from _elsewhere(element)
    elif isinstance(value, Mapping):
        given = value.get("class_path")
        if isinstance(given, str) and given.rpartition(".")[2] in registry().methods:
            yield from _methods(value, "class_path")
            return
        for key, element in value.items():
            if key == "method" and isinstance(element, str):
                yield from (m for name, m in registry().methods.items() if name == element.rpartition(".")[2])
            yield from _elsewhere(element)
