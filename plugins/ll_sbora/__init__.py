"""SBoRA: one factor is a fixed selection of inputs or outputs."""

from __future__ import annotations

from collections.abc import Iterable

from ll_sbora.method import SBoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["SBoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """SBoRA."""
    return [SBoRA]
