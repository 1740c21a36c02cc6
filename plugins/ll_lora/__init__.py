"""LoRA and its scaling rule rsLoRA."""

from __future__ import annotations

from collections.abc import Iterable

from ll_lora.method import LoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["LoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """LoRA."""
    return [LoRA]
