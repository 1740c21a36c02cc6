"""PST: a model is pruned while it is fine-tuned; only small matrices train."""

from __future__ import annotations

from collections.abc import Iterable

from ll_pst.method import PST
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["PST"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """PST."""
    return [PST]
