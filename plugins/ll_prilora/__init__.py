"""PRILoRA: ranks that rise with depth, and a pruned A."""

from __future__ import annotations

from collections.abc import Iterable

from ll_prilora.method import PRILoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["PRILoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """PRILoRA."""
    return [PRILoRA]
