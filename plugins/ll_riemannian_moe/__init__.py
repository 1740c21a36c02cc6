"""MoELoRA: a mixture of low-rank experts with gate-aware gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ll_riemannian_moe.settings import MoELoRA
from lora_lightning import hookimpl
from lora_lightning.methods import Method

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

__all__ = ["MoELoRA"]


@hookimpl
def lora_lightning_methods() -> Iterable[type[Method]]:
    """MoELoRA."""
    return [MoELoRA]


@hookimpl
def lora_lightning_callbacks() -> Iterable[type[Callback]]:
    """RouterStatistics."""
    from ll_riemannian_moe.callback import RouterStatistics

    return [RouterStatistics]
