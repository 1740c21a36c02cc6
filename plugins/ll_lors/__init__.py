"""LoRS: a low-rank update of a sparse model that keeps its zeros."""

from __future__ import annotations

from collections.abc import Iterable

from ll_lors.method import LoRS
from ll_lors.start import LoRSGradient
from lora_lightning import hookimpl
from lora_lightning.methods import Method
from lora_lightning.start_values import Start

__all__ = ["LoRS", "LoRSGradient"]

requires_api = ">=2.1,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """LoRS."""
    return [LoRS]


@hookimpl
def lora_lightning_starts() -> Iterable[type[Start]]:
    """LoRSGradient."""
    return [LoRSGradient]
