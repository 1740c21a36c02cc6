"""Data modules: texts with labels, tags or masks, pairs, completions, preferences, translations, chats, images."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from lora_lightning.data.batches.loader import ResumableLoader
from lora_lightning.data.chat import Chat
from lora_lightning.data.completions import Completions
from lora_lightning.data.images import LabelledImages
from lora_lightning.data.labelled import LabelledText
from lora_lightning.data.masked import MaskedText
from lora_lightning.data.media_chat import MediaChat
from lora_lightning.data.multi_label import MultiLabelText
from lora_lightning.data.pairs import TextPairs
from lora_lightning.data.plain import PlainText
from lora_lightning.data.preferences import Preferences
from lora_lightning.data.tagged import TaggedWords
from lora_lightning.data.text_to_text import TextToText
from lora_lightning.plugins import registry

__all__ = [
    "Chat",
    "Completions",
    "LabelledImages",
    "LabelledText",
    "MaskedText",
    "MediaChat",
    "MultiLabelText",
    "PlainText",
    "Preferences",
    "ResumableLoader",
    "TaggedWords",
    "TextPairs",
    "TextToText",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A data module that a plugin brings and 0.1 had here, so that programs written for it run."""
        component = registry().components.get(name) if name[0].isupper() else None
        if component is None or component.kind != "data module":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        new = component.class_path
        warnings.warn(f"{__name__}.{name} is of 0.1; import {new}", DeprecationWarning, stacklevel=2)
        return component.load()
