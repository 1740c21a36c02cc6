"""CE-LoRA: LoRA with a cheaper backward pass through the frozen layers."""

from __future__ import annotations

from collections.abc import Iterable

from ll_ce_lora.method import CELoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["CELoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """CELoRA."""
    return [CELoRA]
