"""FFA-LoRA: a frozen random A, and federated rounds."""

from __future__ import annotations

from collections.abc import Iterable

from ll_ffa_lora.method import FFALoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["FFALoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """FFALoRA."""
    return [FFALoRA]
