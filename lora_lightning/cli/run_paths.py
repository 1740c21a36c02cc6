"""Paths in a run's config, for a command that is given in another directory than the run was started in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from lora_lightning.storage.run_start import paths_from_start

_PATHS = {
    "model": ("pretrained", "adapter"),
    "data": ("tokenizer", "processor", "chat_template", "train", "validation", "test", "predict"),
}
"""Settings that may name files and folders."""


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
    for section, names in _PATHS.items():
        of_section = settings.get(section) if isinstance(settings, Mapping) else None
        given = of_section.get("init_args", of_section) if isinstance(of_section, Mapping) else None
        if not isinstance(given, dict):
            continue
        for name in names:
            found = paths_from_start(given.get(name), folder)
            if found != given.get(name):
                given[name], changed = found, True
    return str(yaml.safe_dump(settings, default_flow_style=True, width=10**9)).strip() if changed else config
