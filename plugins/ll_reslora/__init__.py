"""ResLoRA: updates of earlier blocks act in later ones too."""

from __future__ import annotations

from collections.abc import Iterable

from ll_reslora.method import ResLoRA, ResLoRAInputs
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["ResLoRA", "ResLoRAInputs"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """ResLoRA, ResLoRAInputs."""
    return [ResLoRA, ResLoRAInputs]
