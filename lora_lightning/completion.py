"""What can stand at the end of a command line, for shells. Imports neither torch nor Lightning: sources are read."""

from __future__ import annotations

import argparse
import ast
import importlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lora_lightning import argv
from lora_lightning.cards import fields_of
from lora_lightning.errors import LoraLightningError
from lora_lightning.plugins import registry

_OWN = {"fit": ("--resume",), "validate": ("--run",), "test": ("--run",), "predict": ("--run", "--output")}
_OF_CONFIGS = ("targets", "inspect-data", "estimate", "doctor", "cite")
_SOURCES = {  # class and file of what --KEY.SETTING sets, below the package's folder
    "model": ("AdapterModule", "lora_lightning", "module.py"),
    "trainer": ("Trainer", "lightning", "pytorch/trainer/trainer.py"),
}


def candidates(words: Sequence[str]) -> list[str]:
    """Words that can stand in place of the last one, which may be empty.

    Args:
        words: those after `python -m lora_lightning`, as far as they are typed.
    """
    *before, current = words or [""]
    last = before[-1] if before else ""
    verb = next((word for word in before if word in (*argv.TRAINING_VERBS, *argv.LIGHT_VERBS)), None)
    return sorted({word for word in _all(before, last, verb) if word.startswith(current)})


def _all(before: Sequence[str], last: str, verb: str | None) -> Iterable[str]:
    known = registry()
    if last in ("--config", "-c"):
        return argv.config_names()
    if last == "-p":
        return [f"no:{name}" for name, _ in known.manager.list_name_plugin()]
    if last in ("--run", "--resume"):
        return [str(path.parent) for path in Path("runs").glob("*/*/config.yaml")]
    if last == "--model.method":
        return known.methods
    if verb is None:
        return [*argv.TRAINING_VERBS, *argv.LIGHT_VERBS, *known.commands]
    if verb == "show":
        return [*known.methods, *known.announced]
    flags = ["--config", "-p"]
    if verb in argv.TRAINING_VERBS:
        return [*flags, *_OWN[verb], *_settings(before)]
    return [*_flags(verb), *(argv.config_names() + flags + list(_settings(before)) if verb in _OF_CONFIGS else ["-p"])]


def _flags(verb: str) -> list[str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"lora_lightning.verbs.{verb.replace('-', '_')}").add_arguments(parser)
    return [flag for action in parser._actions for flag in action.option_strings]


def _settings(words: Sequence[str]) -> Iterator[str]:
    """Flags of settings: of model and trainer, and of the method that flags or configs name."""
    yield from ("--data", "--seed_everything")
    for key, source in _SOURCES.items():
        yield from (f"--{key}.{name}" for name in _parameters(*source))
    method = registry().methods.get(_method(words).rpartition(".")[2])
    if method is not None:
        yield from (f"--model.method.{card.name}" for card in fields_of(method))


def _parameters(cls: str, package: str, file: str) -> list[str]:
    """Parameters of a class, read in its source."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for node in ast.walk(ast.parse(Path(folder, file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name == cls:
                [init, *_] = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
                return [argument.arg for argument in (*init.args.args[1:], *init.args.kwonlyargs)]
    return []


def _method(words: Sequence[str]) -> str:
    """The class path of the method that stands on the line, the last one counts; a config where it is named."""
    found = ""
    for flag, value in pairwise(words):
        if flag == "--model.method":
            found = value
        elif flag in ("--config", "-c"):
            found = _method_of(value) or found
    return found


def _method_of(config: str) -> str:
    try:
        tree: Any = yaml.safe_load(Path(argv.find_config(config)).read_text(encoding="utf-8"))
        method = tree["model"]["method"]
    except (LoraLightningError, OSError, yaml.YAMLError, KeyError, TypeError):
        return ""
    return str(method.get("class_path", "") if isinstance(method, dict) else method)
