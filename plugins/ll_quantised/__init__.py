"""Layers that bitsandbytes and torchao have quantised, as kinds of base layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from lora_lightning import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from lora_lightning.adapters.weights import BaseLayer


@hookimpl
def lora_lightning_base_layers() -> Iterable[Callable[[nn.Module], BaseLayer | None]]:
    """Four and eight bits of bitsandbytes, weight-only formats of torchao."""
    from ll_quantised.bits_and_bytes import bits_and_bytes
    from ll_quantised.torch_ao import torch_ao

    return [bits_and_bytes, torch_ao]
