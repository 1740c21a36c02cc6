"""A file of another tool: which one's it is, and what it says in our words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lora_lightning.cli.imports import adapter_config, axolotl, llama_factory
from lora_lightning.cli.imports.translation import Translation
from lora_lightning.errors import SettingsError

TOOLS = (adapter_config, llama_factory, axolotl)
PEFT = "adapter_config.json"


def translated(file: Path) -> Translation:
    """What a file says, in our words.

    Args:
        file: a YAML or JSON file, or a folder with adapter_config.json.

    Raises:
        SettingsError: it cannot be read, or is of none of the tools.
    """
    file = file / PEFT if file.is_dir() else file
    given = _read(file)
    if {"model", "data"} <= given.keys() or {"model", "trainer"} <= given.keys():
        raise SettingsError(f"{file} is a config of this library already; give it as --config {file}.")
    tool = next((one for one in TOOLS if one.is_mine(given)), None)
    if tool is None:
        raise SettingsError(
            f"{file} is of none of the tools that are read: LLaMA-Factory has model_name_or_path with stage, "
            f"finetuning_type, template or dataset; axolotl has base_model; peft's {PEFT} has peft_type."
        )
    found: Translation = tool.translate(given, file.parent)
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise SettingsError(f'cannot read "{file}": {error.strerror}.') from error
    except (UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f'"{file}" is neither YAML nor JSON: {" ".join(str(error).split())}.') from error
    if not isinstance(found, dict):
        raise SettingsError(f'"{file}" holds no settings.')
    return {str(name): value for name, value in found.items()}
