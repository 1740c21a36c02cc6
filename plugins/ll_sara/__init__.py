"""SaRA: the smallest entries of each weight train, and are chosen again on the way."""

from __future__ import annotations

from collections.abc import Iterable

from ll_sara.method import SaRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["SaRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """SaRA."""
    return [SaRA]
