"""COLA: a chain of LoRA, each merged before the next."""

from __future__ import annotations

from collections.abc import Iterable

from ll_cola.method import COLA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["COLA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """COLA."""
    return [COLA]
