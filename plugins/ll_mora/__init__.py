"""MoRA: a square matrix between maps without parameters; ReMoRA folds it in stages."""

from __future__ import annotations

from collections.abc import Iterable

from ll_mora.method import MoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["MoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """MoRA."""
    return [MoRA]
