"""PeriodicLoRA: many short stages, each of which unloads a part of the update."""

from __future__ import annotations

from collections.abc import Iterable

from ll_periodic_lora.method import PeriodicLoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["PeriodicLoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """PeriodicLoRA."""
    return [PeriodicLoRA]
