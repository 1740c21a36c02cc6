"""What a command line shows that the parser refuses: unknown settings and classes, missing folders and files."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lora_lightning.cli import former_names
from lora_lightning.cli.classes import bases_of, short_names
from lora_lightning.cli.given_settings import given_settings
from lora_lightning.cli.parser_errors import unknown_class, unknown_key
from lora_lightning.data.sources.tables import on_hub, read_table, source_names
from lora_lightning.errors import LoraLightningError
from lora_lightning.models.pretrained import check_weights, resolve

SPLITS = ("train", "validation", "test", "predict")
"""Settings of data modules that name sources."""


def problems(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """One line for each.

    Args:
        words: a command line without a verb.
        parser: has an argument for each setting.
    """
    with former_names.understood(words) as current:
        settings = given_settings(current, former_names.load)
    return [*_unknown_keys(settings, parser), *_unknown_classes(settings, parser), *_missing_files(settings)]


def _unknown_keys(settings: Mapping[str, Any], parser: argparse.ArgumentParser) -> Iterator[str]:
    known = {action.dest for action in parser._actions}
    inside = tuple(
        f"{action.dest}." for action in parser._actions if hasattr(action, "_typehint")
    )  # its class's fields
    for key in settings:
        if key not in known and not key.startswith(inside):
            yield unknown_key(key, parser)


def _unknown_classes(settings: Mapping[str, Any], parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        hint, given = getattr(action, "_typehint", None), settings.get(action.dest)
        bases = bases_of(hint)
        if not bases or str in typing.get_args(hint):  # it takes other words as well
            continue
        known = short_names(bases)
        for one in given if isinstance(given, list) else [given]:
            name = one.get("class_path") if isinstance(one, Mapping) else one
            if isinstance(name, str) and "." not in name and name not in known:
                yield f"{action.dest}: {unknown_class(name, bases)}"


def _missing_files(settings: Mapping[str, Any]) -> Iterator[str]:
    for check in _checks_of_files(settings):
        try:
            check()
        except LoraLightningError as error:
            yield str(error)


def _checks_of_files(settings: Mapping[str, Any]) -> Iterator[Callable[[], object]]:
    if isinstance(pretrained := settings.get("model.pretrained"), str):
        yield partial(check_weights, pretrained)
    for name in ("data.tokenizer", "data.processor"):
        if isinstance(given := settings.get(name), str):
            yield partial(resolve, given, name, needs=None)
    for split in SPLITS:
        given = settings.get(f"data.{split}")
        for source in source_names(given) if isinstance(given, str | list) else ():
            if not on_hub(source) and not Path(source.partition(":")[0]).expanduser().exists():
                yield partial(read_table, source, split)
