"""MultiLoRA: parallel low-rank updates with learned gates."""

from __future__ import annotations

from collections.abc import Iterable

from ll_multilora.method import MultiLoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["MultiLoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """MultiLoRA."""
    return [MultiLoRA]
