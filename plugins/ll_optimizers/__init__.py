"""Optimizers that know factor pairs: LoRA+, LoRA-FA, LoRA-RITE, LoRA-Pro, the Riemannian ones, and relative steps."""

from __future__ import annotations

from collections.abc import Mapping

from lora_lightning import hookimpl

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_optimizers() -> Mapping[str, str]:
    """LoRAPlus, LoRAFA, LoRARITE, LoRAPro, RiemannianSGD, RiemannianAdamW, Multiplicative."""
    return {
        "LoRAPlus": "ll_optimizers.plus:LoRAPlus",
        "LoRAFA": "ll_optimizers.fa:LoRAFA",
        "LoRARITE": "ll_optimizers.rite:LoRARITE",
        "LoRAPro": "ll_optimizers.pro:LoRAPro",
        "Multiplicative": "ll_optimizers.multiplicative:Multiplicative",
        "RiemannianAdamW": "ll_optimizers.riemannian:RiemannianAdamW",
        "RiemannianSGD": "ll_optimizers.riemannian:RiemannianSGD",
    }
