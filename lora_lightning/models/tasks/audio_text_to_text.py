"""Answers about sounds: a language model that hears them too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lora_lightning.models.tasks.image_text_to_text import ImageTextToText


@dataclass(frozen=True, kw_only=True)
class AudioTextToText(ImageTextToText):
    """As image-text-to-text, of models that are made for sounds, such as Qwen2-Audio."""

    name: ClassVar[str] = "audio-text-to-text"
    auto_class: ClassVar[str] = "AutoModelForMultimodalLM"
