"""CoRA: LoRA on a basis that several models share."""

from __future__ import annotations

from collections.abc import Iterable

from ll_cora.method import CoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["CoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """CoRA."""
    return [CoRA]
