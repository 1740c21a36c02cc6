"""SoRA: a gate on each rank component, closed by a proximal step."""

from __future__ import annotations

from collections.abc import Iterable

from ll_sora.method import SoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["SoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """SoRA."""
    return [SoRA]
