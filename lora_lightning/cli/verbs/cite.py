"""Print BibTeX for every method and optimizer of a plugin that configs name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_lightning.cli import configs
from lora_lightning.cli.configs import find_config
from lora_lightning.errors import SettingsError, did_you_mean
from lora_lightning.methods import Method
from lora_lightning.plugins import load_classes, registry
from lora_lightning.start_values import Start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configs."""
    parser.add_argument(
        "configs", metavar="CONFIG", nargs="+", help="config files, names as --config takes them, or names of classes"
    )


def run(args: argparse.Namespace) -> int:
    """Print each entry once, in the order in which the classes are named.

    Raises:
        SettingsError: a config that cannot be read or parsed, such as one that names a method that is not installed.
    """
    entries: dict[str, None] = {}
    for config in args.configs:
        named = named_class(config)
        if named is None:
            _refuse_unknown(config)
        for cls in classes_in(config) if named is None else [named]:
            bibtex = getattr(cls, "bibtex", "")
            if bibtex or _is_of_a_plugin(cls):
                entries[bibtex or f"% {cls.__name__}: its plugin gives no BibTeX entry."] = None
    nothing = f"{', '.join(args.configs)}: no method is named, nothing to cite."
    print("\n\n".join(entries) or nothing)
    return 0


def named_class(name: str) -> type[Any] | None:
    """The method, optimizer or callback that is called so; None where there is none, so that it is a config."""
    known = registry()
    if name in known.methods or name in known.starts:
        return known.settings_class(name, "cite")
    component = known.components.get(name)
    return component.load() if component is not None else None


def _refuse_unknown(name: str) -> None:
    """Raise `SettingsError` for a word that is neither a class nor a place of a file."""
    known = registry()
    classes, carried = [*known.methods, *known.starts, *known.components], configs.config_names()
    if Path(name).name != name or Path(name).suffix or Path(name).exists() or name in carried:
        return
    raise SettingsError(
        f'cite "{name}": no method, start, optimizer or callback of a plugin, no config and no file of that name.'
        f"{did_you_mean(name, [*classes, *carried])} Methods: {', '.join(known.methods)}."
    )


def classes_in(config: str) -> Iterator[type[Any]]:
    """Classes that a config names for its method, optimizer and callbacks, those inside others after them."""
    settings = _settings(config)  # first: what cannot be read is said before anything is imported
    from jsonargparse import ArgumentError
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.cli import OptimizerCallable
    from torch.optim import Optimizer

    from lora_lightning.cli.classes import imported_class
    from lora_lightning.cli.parser import class_paths, parser_of
    from lora_lightning.cli.parser_errors import explain

    bases = {"optimizers": Optimizer, "callbacks": Callback, "datamodules": LightningDataModule}
    load_classes(registry(), {f"lora_lightning_{hook}": base for hook, base in bases.items()})
    parser = parser_of(
        {
            "model.method": Method | None,
            "model.optimizer": OptimizerCallable | None,
            "trainer.callbacks": list[Callback] | Callback | None,
        }
    )
    try:
        parsed = parser.parse_object(settings)
    except ArgumentError as error:
        raise SettingsError(f"{config}: {explain(str(error), parser)}") from error
    for _, path in class_paths(parsed.as_dict()):
        if (cls := imported_class(path)) is not None:
            yield cls


def _settings(config: str) -> dict[str, Any]:
    """What a config gives for the settings that are cited."""
    import yaml

    path = Path(find_config(config))  # first: a name that is none is said before anything is imported
    from lora_lightning.cli.former_names import load

    try:
        tree = load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{config}: not valid YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{config}: cannot be read: {error}") from error
    if not isinstance(tree, Mapping):
        raise SettingsError(f"{config}: a config must be a mapping of settings.")
    found: dict[str, Any] = {}
    for section, names in (("model", ("method", "optimizer")), ("trainer", ("callbacks", "callbacks+"))):
        given = tree.get(section)
        if isinstance(given, Mapping):
            found |= {section: {name.removesuffix("+"): given[name] for name in names if name in given}}
    return found


def _is_of_a_plugin(cls: type[Any]) -> bool:
    return (
        issubclass(cls, Method | Start)
        or cls.__name__ in registry().components
        or cls in (known for _, known in registry().classes.values())
    )
