"""A layer quantized to whole steps of a sixteenth, which needs no package."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_lightning.adapters.layers.quantized import QuantizedBase

STEP = 1 / 16


class Steps(nn.Module):
    """x W^T + b with W = STEP times whole numbers in eight bits."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        codes = (layer.weight.detach() / STEP).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * STEP).T + self.bias


class StepsBase(QuantizedBase):
    def __init__(self, layer: nn.Linear | Steps, differentiable: bool = True) -> None:
        steps = layer if isinstance(layer, Steps) else Steps(layer)
        d_out, d_in = steps.weight.shape
        super().__init__(steps, "steps", d_in, d_out, torch.float32)
        self.differentiable = differentiable

    def dequantize(self) -> Tensor:
        return self.stored.float() * STEP


def serve(module: nn.Module) -> StepsBase | None:
    """What a plugin would answer for a base layer."""
    return StepsBase(module) if isinstance(module, Steps) else None
