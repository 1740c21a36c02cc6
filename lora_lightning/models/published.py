"""What may be told of a base model to others: its id on the hub, its name without where it lies, license and task."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

import yaml

from lora_lightning.errors import LoraLightningError
from lora_lightning.models.pretrained import PACKAGE, resolve
from lora_lightning.models.random import is_random

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SNAPSHOT = re.compile(r"(?:^|[/\\])models--([\w.-]+?)(?:--([\w.-]+))?[/\\]snapshots[/\\]")
_TASKS = (
    ("IMAGE_TEXT_TO_TEXT", "image-text-to-text"),
    ("SEQUENCE_CLASSIFICATION", "text-classification"),
    ("TOKEN_CLASSIFICATION", "token-classification"),
    ("QUESTION_ANSWERING", "question-answering"),
    ("IMAGE_CLASSIFICATION", "image-classification"),
    ("SPEECH_SEQ_2_SEQ", "automatic-speech-recognition"),
    ("CAUSAL_LM", "text-generation"),
    ("SEQ_TO_SEQ_CAUSAL_LM", "text2text-generation"),
    ("MASKED_LM", "fill-mask"),
)


def hub_id(name: str | None) -> str | None:
    """The id on the hub that a base model's name is, or that its folder in the hub's cache belongs to; else None."""
    if not name or is_random(name) or name.startswith(PACKAGE):
        return None
    cached = _SNAPSHOT.search(name)
    if cached is not None:
        return "/".join(part for part in cached.groups() if part)
    return name if _ID.fullmatch(name) and not Path(name).is_dir() else None


def shown_name(name: str | None) -> str:
    """A base model's name for others: of a local folder its last part, never the path to it."""
    if not name:
        return "a model that has no name"
    if (known := hub_id(name)) is not None:
        return known
    if is_random(name) or name.startswith(PACKAGE):
        return name
    return Path(name).expanduser().resolve().name


def license_of(name: str | None) -> str | None:
    """The license that the base model's own card states, where the card lies here; None otherwise."""
    if not name or is_random(name):
        return None
    from huggingface_hub import ModelCard, try_to_load_from_cache

    with suppress(LoraLightningError, OSError, ValueError, TypeError, yaml.YAMLError):
        folder = Path(resolve(name, needs=None))
        known = hub_id(name)
        card = folder / "README.md"
        if not folder.is_dir() and known is not None:
            cached = try_to_load_from_cache(known, "README.md")
            card = Path(cached) if isinstance(cached, str) else card
        if card.is_file():
            stated = ModelCard.load(card, ignore_metadata_errors=True).data.license
            return stated if isinstance(stated, str) else None
    return None


def pipeline_tag(architecture: str | None) -> str | None:
    """The hub's name of the task of a class of transformers; None for any other class."""
    if architecture is None or "transformers" not in sys.modules:
        return None
    from transformers.models.auto import modeling_auto

    for mapping, tag in _TASKS:
        classes = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        if architecture in classes.values():
            return tag
    classes = modeling_auto.MODEL_MAPPING_NAMES
    return "feature-extraction" if architecture in classes.values() else None
