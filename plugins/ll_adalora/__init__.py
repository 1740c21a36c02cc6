"""AdaLoRA: one budget of rank components, which the layers that matter keep."""

from __future__ import annotations

from collections.abc import Iterable

from ll_adalora.method import AdaLoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["AdaLoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """AdaLoRA."""
    return [AdaLoRA]
