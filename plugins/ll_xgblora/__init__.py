"""XGBLoRA: gradient boosting with rank-1 updates of random layers."""

from __future__ import annotations

from collections.abc import Iterable

from ll_xgblora.method import XGBLoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["XGBLoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """XGBLoRA."""
    return [XGBLoRA]
