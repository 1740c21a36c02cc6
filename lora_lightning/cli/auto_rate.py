"""`lr: auto`: the word as a number for the parser, and the rate that a run starts its search at.

The parser knows rates as numbers. So the word is read as "not a number", which no one means by a rate, and is replaced
before an optimizer is made: by the default rate of the optimizer's class times the method's own ratio to it. `fit` then
refines that by a range test and writes the number that it found into config.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import Namespace

from lora_lightning.cli.classes import imported_class
from lora_lightning.cli.given_settings import setting_of
from lora_lightning.registry import arguments

AUTO = "auto"
NOT_A_NUMBER = ".nan"
"""As YAML spells it."""
PLACE = "model.optimizer"
USUAL = 1e-3
"""Rate of optimizers whose class has no default."""


def is_auto(name: str, value: object, place: str) -> bool:
    """Whether a setting of a config is `lr: auto` of an optimizer.

    Args:
        name: of the setting.
        value: its value.
        place: dotted, of the settings around it.
    """
    return name == "lr" and value == AUTO and (place == PLACE or place.startswith(f"{PLACE}."))


def marked(words: Sequence[str]) -> list[str]:
    """A command line whose flags say what the parser reads as no number, where they say `auto` for a rate."""
    found, place = [], ""
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            place = setting_of(flag)
            found.append(f"{flag}={_marked(value, place)}" if equals else word)
        else:
            found.append(_marked(word, place))
            place = ""
    return found


def _marked(value: str, place: str) -> str:
    """What a flag says of an optimizer: a rate, or YAML with rates inside."""
    if AUTO not in value or not f"{place}.".startswith(f"{PLACE}."):
        return value
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        return value  # the parser says why
    around, _, name = place.rpartition(".")
    if is_auto(name, read, around):
        return NOT_A_NUMBER
    return yaml.safe_dump(_replaced(read), default_flow_style=True) if isinstance(read, dict) else value


def _replaced(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: math.nan if key == "lr" and value == AUTO else _replaced(value) for key, value in node.items()}


class AutoRate:
    """The rate of a parsed config that was `auto`.

    Args:
        settings: the optimizer's, as parsed.
        ratio: the method's best rate over the optimizer's default.
    """

    def __init__(self, settings: Namespace, ratio: float) -> None:
        self.settings = settings
        owner = imported_class(settings.class_path)
        default = arguments(owner)["lr"].default if owner is not None else None
        self.start = ratio * (default if isinstance(default, float | int) else USUAL)
        self.set(self.start)

    def set(self, rate: float) -> None:
        """Put a number into the config."""
        self.settings.init_args["lr"] = rate


def auto_rate(optimizer: object, method: object) -> AutoRate | None:
    """The rate that is `auto` in parsed settings of an optimizer, replaced by its start; None where none is.

    Args:
        optimizer: the parsed settings, of an optimizer around others too.
        method: the parsed settings of the method.
    """
    if not isinstance(optimizer, Namespace) or "init_args" not in optimizer:
        return None
    rate = optimizer.init_args.get("lr")
    if isinstance(rate, float) and math.isnan(rate):
        return AutoRate(optimizer, ratio_of(method))
    inner = optimizer.init_args.get("inner")
    return auto_rate(inner, method)


def ratio_of(method: object) -> float:
    """The rate ratio of a method's class; of one around another the product of both."""
    if not isinstance(method, Namespace):
        return 1.0
    owner = imported_class(method.class_path)
    ratio = float(getattr(owner, "rate_ratio", 1.0))
    return ratio * ratio_of(method.get("init_args.inner"))
