"""DoRA: weight-decomposed low-rank adaptation."""

from __future__ import annotations

from collections.abc import Iterable

from ll_dora.method import DoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["DoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """DoRA."""
    return [DoRA]
