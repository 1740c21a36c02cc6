"""Answers about images: a language model that reads them too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor

from lora_lightning.models.generation import continued_batch
from lora_lightning.models.tasks.base import Batch, PredictContext
from lora_lightning.models.tasks.causal_lm import CausalLM, greedy, last_text

PROMPTS = "prompts"
"""Key of a batch for what the model answers: inputs padded on the left, with the images before each answer alone."""
_BESIDE = ("labels", "index", "window_tokens", PROMPTS)
"""What a batch holds beside inputs of the model."""


@dataclass(frozen=True, kw_only=True)
class ImageTextToText(CausalLM):
    """Cross-entropy over the tokens that carry a label, as of causal-lm, where prompts hold images.

    The model gets whatever its processor has made: names differ by family.
    """

    name: ClassVar[str] = "image-text-to-text"
    auto_class: ClassVar[str] = "AutoModelForImageTextToText"

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """All of a batch but labels and what counts them."""
        return {key: value for key, value in batch.items() if key not in _BESIDE}

    def continued(self, model: Any, batch: Batch, context: PredictContext) -> list[str] | None:
        """The greedy continuation of the batch's prompts; None where it carries none."""
        prompts = cast("Mapping[str, Tensor] | None", batch.get(PROMPTS))
        if prompts is None:
            return None
        return continued_batch(model, context.tokenizer, prompts, last_text(context), **greedy(context))
