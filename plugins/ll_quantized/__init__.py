"""Layers that bitsandbytes and torchao have quantized, as kinds of base layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from lora_lightning import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from lora_lightning.adapters.layers.base import BaseLayer

requires_api = ">=2,<3"


@hookimpl
def lora_lightning_base_layers() -> Iterable[Callable[[nn.Module], BaseLayer | None]]:
    """Four and eight bits of bitsandbytes, weight-only formats of torchao."""
    from ll_quantized.bits_and_bytes import bits_and_bytes
    from ll_quantized.torch_ao import torch_ao

    return [bits_and_bytes, torch_ao]
