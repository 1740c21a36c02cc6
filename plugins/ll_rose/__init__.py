"""RoseLoRA: row- and column-wise sparse factors."""

from __future__ import annotations

from collections.abc import Iterable

from ll_rose.method import RoseLoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["RoseLoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """RoseLoRA."""
    return [RoseLoRA]
