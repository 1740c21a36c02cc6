"""Prompts with images and sounds: rendered turns, and what a model that answers them gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lightning.data.chats.rendering import Renderer, Tools
from lora_lightning.data.chats.turns import Turn
from lora_lightning.data.media.encoding import processed
from lora_lightning.data.media.parts import Media, media_in
from lora_lightning.data.sources.faults import RowError
from lora_lightning.errors import DataError
from lora_lightning.models.generation import padded


@dataclass(frozen=True)
class Prompt:
    """What goes before an answer."""

    ids: list[int]
    """Token ids, with those that stand for images and sounds."""
    text: str = ""
    """The rendered text, where a processor makes the ids."""
    media: tuple[Media, ...] = ()
    """Images and sounds, read again where they are used."""


def rendered_prompt(renderer: Renderer, turns: Sequence[Turn], where: str, tools: Tools = None) -> Prompt:
    """The prompt of turns in parts, which ends where the assistant's next turn begins.

    Args:
        renderer: the template over a processor.
        turns: with images and sounds that hold values.
        where: what to call them in messages.
        tools: descriptions of tools.

    Raises:
        RowError: the template refuses them, or an image cannot be read.
    """
    text = renderer.text(turns, tools, where, prompt=True)
    try:
        return Prompt(renderer.encoded(text, turns).ids, text, tuple(media_in(turns)))
    except RowError as error:
        raise RowError(error.kind, f"{where}: {error}") from error


def model_inputs(
    prompts: Sequence[Prompt], tokenizer: Any, processor: Any, read: Callable[[Media], Any], model: Any
) -> dict[str, Tensor]:
    """What the model gets of prompts: token ids and mask (b, l), padded on the left, and images and sounds.

    Args:
        prompts: at least one.
        tokenizer: with a token to pad with.
        processor: what has made the prompts with images or sounds; None where there are none.
        read: what opens an image or a sound.
        model: where it goes.

    Raises:
        DataError: the processor makes no tensors of these prompts together.
        RowError: a file cannot be read any more.
    """
    if not any(one.media for one in prompts):
        return padded([one.ids for one in prompts], tokenizer.pad_token_id, model.device)
    opened = [[Media(media.kind, read(media)) for media in one.media] for one in prompts]
    made = processed(processor, [one.text for one in prompts], opened, "left")
    if other := [name for name, value in made.items() if not isinstance(value, Tensor)]:
        raise DataError(
            f"{type(processor).__name__} makes no tensor of {', '.join(other)} for {len(prompts)} prompts at once, "
            "whose images differ in size. Ask one at a time (generate: --batch_size 1), or bring them to one size."
        )
    return {
        name: value.to(model.device, model.dtype if torch.is_floating_point(value) else None)
        for name, value in made.items()
    }
