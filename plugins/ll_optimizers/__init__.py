"""Optimizers that know factor pairs: LoRA+, LoRA-FA, LoRA-RITE and LoRA-Pro."""

from __future__ import annotations

from collections.abc import Mapping

from lora_lightning import hookimpl

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_optimizers() -> Mapping[str, str]:
    """LoRAPlus, LoRAFA, LoRARITE, LoRAPro."""
    return {
        "LoRAPlus": "ll_optimizers.plus:LoRAPlus",
        "LoRAFA": "ll_optimizers.fa:LoRAFA",
        "LoRARITE": "ll_optimizers.rite:LoRARITE",
        "LoRAPro": "ll_optimizers.pro:LoRAPro",
    }
