"""ReLoRA: high-rank training by a chain of low-rank updates, with pruned moments and jagged restarts of the rate."""

from __future__ import annotations

from collections.abc import Iterable

from ll_relora.method import ReLoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["ReLoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """ReLoRA."""
    return [ReLoRA]
