"""LoRASC: slow cascaded learning around another method, and SlowFast, slow-fast blending around any optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ll_lorasc.method import LoRASC
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["LoRASC"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """LoRASC."""
    return [LoRASC]


@hookimpl
def lora_lightning_optimizers() -> Mapping[str, str]:
    """SlowFast."""
    return {"SlowFast": "ll_lorasc.optim:SlowFast"}
