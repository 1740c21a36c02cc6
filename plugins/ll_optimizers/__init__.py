"""Optimizers that know factor pairs: LoRA+, LoRA-FA, LoRA-RITE, LoRA-Pro and the Riemannian ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lora_lightning import hookimpl

if TYPE_CHECKING:
    from torch.optim import Optimizer


@hookimpl
def lora_lightning_optimizers() -> Iterable[type[Optimizer]]:
    """LoRAPlus, LoRAFA, LoRARITE, LoRAPro, RiemannianSGD, RiemannianAdamW."""
    from ll_optimizers.fa import LoRAFA
    from ll_optimizers.plus import LoRAPlus
    from ll_optimizers.pro import LoRAPro
    from ll_optimizers.riemannian import RiemannianAdamW, RiemannianSGD
    from ll_optimizers.rite import LoRARITE

    return [LoRAPlus, LoRAFA, LoRARITE, LoRAPro, RiemannianSGD, RiemannianAdamW]
