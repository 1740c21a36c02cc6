"""Settings as a command line gives them, before any parser has seen them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def given_settings(words: Sequence[str], load: Callable[[str], Any]) -> dict[str, Any]:
    """Values by dotted key, `init_args` left out, of all configs and flags; later ones win.

    A class path stands under the key of the class. What cannot be read gives nothing.

    Args:
        words: a command line.
        load: reads YAML.
    """
    found: dict[str, Any] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        value = value if equals else following
        if flag == "--config":
            found |= flat(_loaded(config_text(value), load))
        elif flag.startswith("--"):
            found[setting_of(flag)] = _loaded(value, load)
    return found


def origin_of(words: Sequence[str], key: str, load: Callable[[str], Any]) -> str:
    """The flag or the config file that gave a setting last; empty where none did.

    Args:
        words: a command line.
        key: dotted, without `init_args`.
        load: reads YAML.
    """
    found = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        value = value if equals else following
        if flag == "--config" and key in flat(_loaded(config_text(value), load)):
            found = value if "\n" not in value else "a config"
        elif flag.startswith("--") and flag != "--config":
            given = setting_of(flag)
            inside = key.removeprefix(f"{given}.").split(".") if key.startswith(f"{given}.") else []
            node = flat(_loaded(value, load)) if inside else {}
            if given == key or ".".join(inside) in node:
                found = flag.replace(".init_args", "")
    return found


def shown_origin(origin: str) -> str:
    """A flag as it is, and of a file its last two parts."""
    return origin if origin.startswith("--") else str(Path(*Path(origin).parts[-2:]))


def setting_of(flag: str) -> str:
    """The key that a flag sets: `--trainer.callbacks+` adds to `trainer.callbacks`."""
    return flag.lstrip("-").replace(".init_args", "").removesuffix("+")


def config_text(config: str) -> str:
    """What a config holds: a file, or YAML itself."""
    try:
        return Path(config).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return config


def _loaded(text: str, load: Callable[[str], Any]) -> Any:
    try:
        return load(text)
    except (yaml.YAMLError, TypeError):  # jsonargparse's loader raises the second for a key without a name
        return None


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """Settings by dotted key, below `key`; a class path stands under the key of the class."""
    if not isinstance(node, Mapping):
        return {key: node} if key else {}
    found: dict[str, Any] = {}
    for name, value in node.items():
        inside = key if name in ("class_path", "init_args") else f"{key}.{name}".lstrip(".").removesuffix("+")
        found |= flat(value, inside)
    return found
