"""Null where a setting has no null: the parser lets it pass for every type, and a text would become nothing."""

from __future__ import annotations

import argparse
import inspect
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import Namespace

from lora_lightning.cli.classes import imported_class, parameter_types
from lora_lightning.registry import arguments

_WORDS: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def nulls(config: Namespace, parser: argparse.ArgumentParser) -> Iterator[str]:
    """One sentence for each setting that is null and may not be.

    Args:
        config: what was parsed.
        parser: what parsed it.
    """
    for action in parser._actions:
        if isinstance(action.choices, dict):  # verbs
            for verb, inner in action.choices.items():
                if isinstance(config.get(verb), Namespace):
                    yield from nulls(config[verb], inner)
        elif getattr(action, "_typehint", None) is not None:
            value = config.get(action.dest, action.default)
            yield from _in(value, action._typehint, action.default, action.dest)  # type: ignore[attr-defined]


def _in(value: Any, kind: Any, default: Any, key: str, of: str = "") -> Iterator[str]:
    """Sentences on a value, a setting of the class `of`, and what lies inside."""
    if value is None and default is not None and not _allows(kind):
        if default is inspect.Parameter.empty:
            yield f"{key}{of and f' ({of})'} is not given; it must be {_words(kind)}."
        else:
            otherwise = json.dumps(default, default=str)
            yield f"{key} is null; it must be {_words(kind)}. Leave it out, and it is {otherwise}."
    for one in value if isinstance(value, list) else [value]:
        given = dict(vars(one)) if isinstance(one, Namespace) else one if isinstance(one, Mapping) else {}
        owner = imported_class(str(given.get("class_path")))
        if owner is None:
            continue
        settings, hints, taken = given.get("init_args") or {}, parameter_types(owner), arguments(owner)
        for name, own in (vars(settings) if isinstance(settings, Namespace) else settings).items():
            if name in taken and name in hints:
                yield from _in(own, hints[name], taken[name].default, f"{key}.{name}", owner.__name__)


def _allows(kind: Any) -> bool:
    """Whether a type has null; what is no class and no container of a kind may have it."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_allows(one) for one in get_args(kind))
    if origin is Literal:
        return None in get_args(kind)
    if origin is not None:
        return origin not in (list, dict, tuple, set, Sequence, Mapping)
    return kind in (object, types.NoneType) or not isinstance(kind, type)


def _words(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        plain = [one for one in get_args(kind) if one in _WORDS]
        return " or ".join(_words(one) for one in plain or get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(f'"{one}"' for one in get_args(kind))
    if get_origin(kind) in (list, tuple, set, Sequence):
        return "a list"
    if get_origin(kind) in (dict, Mapping):
        return "a mapping"
    return _WORDS.get(kind) or (f"a {kind.__name__}" if isinstance(kind, type) else str(kind))
