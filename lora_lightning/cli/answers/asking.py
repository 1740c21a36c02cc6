"""What a voice is asked with: turns through its chat template and, where it reads images or sounds, its processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lora_lightning.cli.answers.voices import Voice
from lora_lightning.data.chats.rendering import Renderer, Tools
from lora_lightning.data.chats.turns import Turn, text_content
from lora_lightning.data.media.parts import media_in, parts_of
from lora_lightning.data.media.prompts import Prompt, model_inputs, rendered_prompt
from lora_lightning.data.sources.faults import RowError


def as_read(voice: Voice, turns: Sequence[Turn], where: str) -> list[Turn]:
    """The turns with content as the voice's template takes it: in parts, or as text.

    Raises:
        RowError: they hold images or sounds, and the voice reads none.
    """
    if voice.processor is not None:
        return [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if isinstance(turn["content"], str)
            else turn
            for turn in turns
        ]
    if held := next(media_in(turns), None):
        raise reads_none(voice, f"{where} has a part of type {held.kind}")
    return list(turns)


def reads_none(voice: Voice, what: str) -> RowError:
    """The error of a voice that is given an image or a sound and reads none."""
    return RowError("with images or sounds", f"{what}, and {voice.label} reads texts alone: {voice.without}")


def content_of(voice: Voice, given: Any, where: str) -> Any:
    """Content of a turn: parts for a voice that reads images or sounds, else one text; raises `RowError`."""
    if voice.processor is not None:
        return parts_of(given, where)
    if not isinstance(given, list):
        return text_content(given, where)
    parts = parts_of(given, where) or []
    if held := next((part["type"] for part in parts if part["type"] != "text"), None):
        raise reads_none(voice, f"{where} has a part of type {held}")
    return "".join(part["text"] for part in parts)


def prompt_of(
    voice: Voice, turns: Sequence[Turn], where: str, tools: Tools = None, by: Renderer | None = None
) -> Prompt:
    """The prompt that ends where the assistant's next turn begins.

    Args:
        voice: who is asked.
        turns: the conversation, with images and sounds that hold values.
        where: what to call it in messages.
        tools: descriptions of tools.
        by: the voice's renderer with other variables of the template; None takes its own.

    Raises:
        RowError: the template refuses it, or an image cannot be read.
    """
    renderer = by or voice.renderer
    turns = as_read(voice, turns, where)
    if voice.processor is None:
        return Prompt(renderer.prompt(turns, tools, where))
    return rendered_prompt(renderer, turns, where, tools)


def inputs_of(voice: Voice, prompts: Sequence[Prompt], model: Any) -> dict[str, Tensor]:
    """What the model gets of a voice's prompts, see `model_inputs`."""
    return model_inputs(prompts, voice.tokenizer, voice.processor, voice.read, model)
