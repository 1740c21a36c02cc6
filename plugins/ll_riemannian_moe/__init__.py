"""MoELoRA: a mixture of low-rank experts with gate-aware gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ll_riemannian_moe.method import MoELoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

__all__ = ["MoELoRA"]

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """MoELoRA."""
    return [MoELoRA]


@hookimpl
def lora_lightning_callbacks() -> Mapping[str, str]:
    """RouterStatistics."""
    return {"RouterStatistics": "ll_riemannian_moe.callback:RouterStatistics"}
