"""RAC-LoRA: a randomized asymmetric chain of LoRA."""

from __future__ import annotations

from collections.abc import Iterable

from ll_rac_lora.method import RACLoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["RACLoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """RACLoRA."""
    return [RACLoRA]
