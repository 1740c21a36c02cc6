"""LoRASC: slow cascaded learning around another method, and SlowFast, slow-fast blending around any optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ll_lorasc.settings import LoRASC
from lora_lightning import hookimpl
from lora_lightning.methods import Method

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["LoRASC"]


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """LoRASC."""
    return [LoRASC]


@hookimpl
def lora_lightning_optimizers() -> Iterable[type[Optimizer]]:
    """SlowFast."""
    from ll_lorasc.optim import SlowFast

    return [SlowFast]
