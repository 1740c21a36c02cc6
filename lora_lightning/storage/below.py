"""Adapters that another one was trained on top of: found in a model by what their files held, or asked for by name."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lora_lightning.errors import AdapterFileError
from lora_lightning.injection.records import Below, records
from lora_lightning.storage.stored import Stored

SHOWN = 12
"""Digits of a digest in messages."""


def find_below(root: nn.Module, stored: Stored, directory: str | Path) -> tuple[Below, ...]:
    """The adapters of a model that a stored one was trained on top of.

    Raises:
        AdapterFileError: one of them is not in the model, or trains there.
    """
    there = {record.digest: name for name, record in records(root).items() if record.digest is not None}
    missing = [one for one in stored.below if one["digest"] not in there]
    if missing:
        named = ", ".join(f'"{one["source"]}" (sha256 {one["digest"][:SHOWN]})' for one in missing)
        first = missing[0]["source"]
        raise AdapterFileError(
            f'"{directory}" was trained on top of {named}, and says nothing without. Load that first, under another '
            f'name: load_adapter(model, "{first}", name="below"), or import_peft for one of peft\'s, and freeze it.'
        )
    return tuple(Below(there[one["digest"]], one["digest"], one["source"]) for one in stored.below)
