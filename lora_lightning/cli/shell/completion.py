"""What can stand at the end of a command line, for shells. Imports neither torch nor Lightning: sources are read."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.cli import configs
from lora_lightning.cli.cards import fields_of
from lora_lightning.cli.configs import find_config
from lora_lightning.cli.shell.sources import known_names, parameters
from lora_lightning.errors import LoraLightningError
from lora_lightning.plugins import registry
from lora_lightning.registry import LIGHT_VERBS, TRAINING_VERBS

_OWN = {"fit": ("--resume",), "validate": ("--run",), "test": ("--run",), "predict": ("--run", "--output")}
_OF_CONFIGS = ("targets", "inspect-data", "estimate", "doctor", "cite")
_FIXED = {"model": ("lora_lightning.training.module", "AdapterModule"), "trainer": ("lightning.pytorch", "Trainer")}
"""Module and class of what --KEY.SETTING sets."""
_CHOSEN = {
    "data": "datamodules",
    "model.optimizer": "optimizers",
    "trainer.callbacks": "callbacks",
    "trainer.strategy": "strategies",
}
"""Kind of the classes that a setting names."""
_OTHERS = (
    "ResumableLoader",
    "Optimizer",
    "Callback",
    "StepCallback",
    "ScheduleCallback",
    "Strategy",
    "ParallelStrategy",
)
"""What stands beside such classes: their bases, and a loader."""
_STRATEGIES = ("auto", "ddp")
"""Values of trainer.strategy that are no class."""


def candidates(words: Sequence[str]) -> list[str]:
    """Words that can stand in place of the last one, which may be empty.

    Args:
        words: those after `python -m lora_lightning`, as far as they are typed.
    """
    *before, current = words or [""]
    last = before[-1] if before else ""
    verb = next((word for word in before if word in (*TRAINING_VERBS, *LIGHT_VERBS)), None)
    return sorted({word for word in _all(before, last, verb) if word.startswith(current)})


def _all(before: Sequence[str], last: str, verb: str | None) -> Iterable[str]:
    known = registry()
    if last in ("--config", "-c"):
        return configs.config_names()
    if last == "-p":
        return [f"no:{name}" for name, _ in known.manager.list_name_plugin()]
    if last in ("--run", "--resume"):
        return [str(path.parent) for path in Path("runs").glob("*/*/config.yaml")]
    if last == "--model.method":
        return known.methods
    if (key := last.removeprefix("--").removesuffix("+")) in _CHOSEN and last.startswith("--"):
        return [*_classes(_CHOSEN[key]), *(_STRATEGIES if key == "trainer.strategy" else ())]
    if verb is None:
        return [*TRAINING_VERBS, *LIGHT_VERBS, *known.commands]
    if verb == "show":
        return [*known.methods, *known.announced]
    flags = ["--config", "-p"]
    if verb in TRAINING_VERBS:
        return [*flags, *_OWN[verb], *_settings(before)]
    if verb not in _OF_CONFIGS:
        return [*_flags(verb), "-p"]
    return [*_flags(verb), *configs.config_names(), *flags, *_settings(before)]


def _flags(verb: str) -> list[str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"lora_lightning.cli.verbs.{verb.replace('-', '_')}").add_arguments(parser)
    return [flag for action in parser._actions for flag in action.option_strings]


def _classes(kind: str) -> list[str]:
    """Short names of torch's, Lightning's, core's and the plugins' classes."""
    announced = [name for name, (_, hook) in registry().announced.items() if hook.endswith(kind)]
    return [*(name for name in known_names(kind) if name not in _OTHERS), *announced]


def _settings(words: Sequence[str]) -> Iterator[str]:
    """Flags of settings: of model and trainer, and of the classes that flags or configs name."""
    yield from ("--data", "--seed_everything")
    for key, source in _FIXED.items():
        yield from (f"--{key}.{name}" for name in parameters(*source))
    method = registry().methods.get(_named(words, "model.method").rpartition(".")[2])
    if method is not None:
        yield from (f"--model.method.{card.name}" for card in fields_of(method))
    for key, kind in _CHOSEN.items():
        home, _, name = _named(words, key).rpartition(".")
        home = home or known_names(kind).get(name, "") or _plugin_of(name)
        yield from (f"--{key}.{setting}" for setting in parameters(home, name) if home and setting != "params")


def _plugin_of(name: str) -> str:
    """Import path of the plugin that brings a class."""
    known = registry()
    plugin, _ = known.announced.get(name, ("", ""))
    return str(getattr(known.manager.get_plugin(plugin), "__name__", ""))


def _named(words: Sequence[str], key: str) -> str:
    """The class path that a setting has: what the line says last, or a config that it names."""
    found = ""
    for flag, value in pairwise(words):
        if flag.rstrip("+") == f"--{key}":
            found = value
        elif flag in ("--config", "-c"):
            found = _configured(value, key) or found
    return found


def _configured(config: str, key: str) -> str:
    """The class path that a config gives a setting; empty where it gives none, or cannot be read."""
    try:
        node: Any = yaml.safe_load(Path(find_config(config)).read_text(encoding="utf-8"))
        for part in key.split("."):
            node = node[part]
    except (LoraLightningError, OSError, yaml.YAMLError, KeyError, TypeError):
        return ""
    return str(node.get("class_path", "")) if isinstance(node, dict) else node if isinstance(node, str) else ""
