"""Settings that are text: what a flag gives them stays as it is, also where YAML would read it as something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import get_loader

from lora_lightning.cli.given_settings import setting_of
from lora_lightning.registry import arguments

_TEXT = {"str": False, "<class 'str'>": False, "str | None": True, "None | str": True, "typing.Optional[str]": True,
         "Optional[str]": True}  # fmt: skip
"""Types that are text, as they are written, and whether null is one of their values."""
_NULL = ("", "~", "null", "Null", "NULL")


def texts_in(words: Sequence[str], places: Mapping[str, type[Any]]) -> frozenset[str]:
    """Values of flags for settings that are text, as far as YAML reads them otherwise.

    A value that another flag gives to a setting of another type is left out.

    Args:
        words: a command line.
        places: classes by the dotted place that their settings have.
    """
    found: set[str] = set()
    others: set[str] = set()
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            continue
        value = value if equals else following
        nullable = is_text(setting_of(flag), places)
        if nullable is None or (nullable and value in _NULL):
            others.add(value)
        elif not isinstance(_read(value), str):
            found.add(value)
    return frozenset(found - others)


def is_text(setting: str, places: Mapping[str, type[Any]]) -> bool | None:
    """Whether null is a value of a setting that is text; None for any other setting."""
    place, _, name = setting.rpartition(".")
    parameter = arguments(places[place]).get(name) if place in places else None
    if parameter is None:
        return None
    return _TEXT.get(str(parameter.annotation))


def _read(text: str) -> Any:
    try:
        return get_loader("yaml")(text)
    except TypeError:  # a key without a name
        return None
    except yaml.YAMLError:
        return text  # the parser takes it as it stands
