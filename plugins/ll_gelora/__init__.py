"""GeLoRA: ranks from the intrinsic dimension of hidden states."""

from __future__ import annotations

from collections.abc import Iterable

from ll_gelora.method import GeLoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["GeLoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """GeLoRA."""
    return [GeLoRA]
