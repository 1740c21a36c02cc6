"""A quantized linear layer of plain torch: eight bits with one scale a row, for tests that need no package."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lora_lightning.adapters.layers.quantized import QuantizedBase


class RowScaledLinear(nn.Module):
    """Its weight is stored as int8; forward dequantizes it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        dtype = layer.weight.dtype
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        numbers = (layer.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.register_buffer("scale", scale.to(dtype))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def dequantized(self) -> Tensor:
        return self.weight.to(self.scale.dtype) * cast(Tensor, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantized(), self.bias)


class RowScaledBase(QuantizedBase):
    """Base layer of one."""

    def __init__(self, module: RowScaledLinear) -> None:
        super().__init__(module, "row-scaled int8", module.weight.shape[1], module.weight.shape[0], module.scale.dtype)

    def dequantize(self) -> Tensor:
        return cast(RowScaledLinear, self.module).dequantized()


def row_scaled_base(module: nn.Module) -> RowScaledBase | None:
    """The kind of base layer, as a plugin provides it."""
    return RowScaledBase(module) if isinstance(module, RowScaledLinear) else None
