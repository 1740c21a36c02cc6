"""Paths in a run's config, for a command that is given in another directory than the run was started in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.storage.run_start import CONFIG, paths_from_start

_PATHS = {
    "model": ("pretrained", "adapter"),
    "data": ("tokenizer", "processor", "chat_template", "train", "validation", "test", "predict"),
}
"""Settings that may name files and folders."""
_OF_CALLBACKS = ("prompts",)
"""Those of callbacks."""


def located(config: str, folder: Path) -> str:
    """`config` itself, or its text with paths that lead to what the run was given.

    Args:
        config: a file of a run, or its text.
        folder: the run folder.
    """
    try:
        text = Path(config).read_text(encoding="utf-8") if config == str(folder / "config.yaml") else config
        settings = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return config  # the parser says what is wrong with it
    changed = False
    for given, name in _places(settings):
        found = paths_from_start(given.get(name), folder)
        if found != given.get(name):
            given[name], changed = found, True
    return str(yaml.safe_dump(settings, default_flow_style=True, width=10**9)).strip() if changed else config


def as_given(config: Any, folder: Path) -> Any:
    """A run's settings, with what `located` has found as the run's config.yaml names it; the same where there is none.

    Args:
        config: settings of a fit, as the parser has them.
        folder: the run folder.
    """
    try:
        before = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return config
    found = config.clone()
    theirs = [(given.get(name), name) for given, name in _places(before)]
    for (ours, name), (given, other) in zip(_places(found), theirs, strict=False):
        if name == other and given is not None and ours.get(name) == paths_from_start(given, folder):
            ours[name] = given
    return found


def _places(settings: Any) -> Iterator[tuple[Any, str]]:
    """Where settings may name files and folders: what holds each, and its name there."""
    callbacks = _held(_held(settings, "trainer"), "callbacks")
    for section, names in _PATHS.items():
        of_section = _held(settings, section)
        yield from ((_held(of_section, "init_args") or of_section or {}, name) for name in names)
    for callback in callbacks if isinstance(callbacks, list) else ():
        yield from ((_held(callback, "init_args") or {}, name) for name in _OF_CALLBACKS)


def _held(settings: Any, name: str) -> Any:
    return settings.get(name) if hasattr(settings, "get") else None
