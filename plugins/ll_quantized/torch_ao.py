"""nn.Linear whose weight torchao has quantized, weight-only.

    torchao-int8    Int8Tensor, one scale a row
    torchao-int4    Int4TilePackedTo4dTensor (CUDA) and IntxUnpackedToInt8Tensor, one scale and zero point a group

A format that quantizes inputs too is served as well: it is called as it is. The package is not imported here.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from lora_lightning.adapters.layers.quantized import QuantizedBase

_HAS_NO_BACKWARD = ("Int4",)


class TorchAOBase(QuantizedBase):
    """nn.Linear with a tensor subclass of torchao as its weight.

    The backward is formed here: the packed four-bit product has none, and that of others may keep a dequantized weight.
    """

    own_backward = False

    def __init__(self, module: nn.Linear) -> None:
        weight = module.weight
        super().__init__(module, _name(weight), module.in_features, module.out_features, weight.dtype)
        self.differentiable = not type(weight.data).__name__.startswith(_HAS_NO_BACKWARD)

    def dequantize(self) -> Tensor:
        """The weight as the package gives it, or, where it does not, as the product with the unit matrix."""
        weight = cast(Any, self.module.weight)
        if type(weight.data).dequantize is not Tensor.dequantize:
            return cast(Tensor, weight.dequantize())
        return F.linear(torch.eye(self.d_in, dtype=weight.dtype, device=weight.device), weight).mT


def _name(weight: Any) -> str:
    bits = getattr(weight, "target_dtype", None)  # a format of any width, stored in whole bytes
    if bits is not None:
        return f"torchao-{str(bits).removeprefix('torch.')}"
    name = type(weight.data).__name__
    width = re.match(r"[A-Za-z]+?\d+", name)
    return f"torchao-{(width[0] if width else name).lower()}"


def torch_ao(module: nn.Module) -> QuantizedBase | None:
    """The base layer of a linear layer whose weight is a tensor of torchao."""
    weight = module._parameters.get("weight")
    if weight is None or type(module) is not nn.Linear:
        return None
    return TorchAOBase(module) if type(weight.data).__module__.startswith("torchao.") else None
