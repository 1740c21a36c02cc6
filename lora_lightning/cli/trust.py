"""What a run folder may do that somebody else has written: name a model, a method, a task and data, and compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from lora_lightning.errors import RunFolderError
from lora_lightning.plugins import entries

_SECTIONS = ("model", "data", "trainer", "seed_everything", "checkpoint_minutes", "serve_with")
_OBJECTS = ("callbacks", "logger", "plugins", "profiler")
_HARMLESS = ("lora_lightning", "torch.optim", "lightning.pytorch.cli")


def trusted_config(config: str) -> str:
    """`config` itself, or its text without what could do more than compute; says what is left out.

    Objects of the trainer (callbacks, loggers, profilers, plugins, strategies that are classes) are left out.

    Raises:
        RunFolderError: the model or the data name a class that is neither of core nor of an installed plugin.
    """
    try:
        settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return config  # the parser says what is wrong with it
    if not isinstance(settings, Mapping):
        return config
    for key, name in _classes({name: settings[name] for name in ("model", "data") if name in settings}):
        if not _is_known(name):
            raise RunFolderError(
                f"{config}: {key} is {name}, which is neither of lora_lightning nor of an installed plugin; to import "
                "it is to run its code. Give --trust-run if you know who wrote this run."
            )
    trainer = settings.get("trainer") if isinstance(settings.get("trainer"), Mapping) else {}
    objects = [name for name, value in (trainer or {}).items() if _is_object(name, value)]
    others = [name for name in settings if name not in _SECTIONS]
    left_out = [*(f"trainer.{name}" for name in objects), *(name for name in others if settings[name] is not None)]
    if not left_out:
        return config
    print(f"{config}: {', '.join(left_out)} left out; --trust-run takes all of it")
    kept = {name: value for name, value in settings.items() if name not in others}
    kept["trainer"] = {name: value for name, value in (trainer or {}).items() if name not in objects}
    return str(yaml.safe_dump(kept, default_flow_style=True, width=10**9)).strip()


def _is_object(name: str, value: object) -> bool:
    """Whether a setting of the trainer makes an object."""
    if name in _OBJECTS:
        return bool(value) and value is not True
    return isinstance(value, Mapping) or (name == "strategy" and "." in str(value))


def _classes(node: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys and names of all classes that settings give by a path."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            inside = key if name in ("class_path", "init_args") else f"{key}.{name}".lstrip(".")
            if name in ("class_path", "method", "optimizer", "data") and isinstance(value, str):
                yield inside, value
            else:
                yield from _classes(value, inside)
    elif isinstance(node, list):
        for value in node:
            yield from _classes(value, key)


def _is_known(class_path: str) -> bool:
    packages = {entry.module.partition(".")[0] for entry in entries()}
    named = class_path.replace(":", ".")
    return "." not in named or any(named.startswith(f"{known}.") for known in (*_HARMLESS, *packages))
