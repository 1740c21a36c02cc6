"""A layer called with a weight that an adapter forms from the frozen one, formed again in backward.

    y = base.apply(x, f(W), b)

Autograd would keep f(W), and what f computes on its way, until backward: tensors as large as the weight, for every
layer. Here nothing but the input is kept. Backward forms the weight again, one layer at a time, and frees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.quantized import QuantizedBase


def forward_from_weight(base: BaseLayer, x: Tensor, formed: Callable[[Tensor], Tensor]) -> Tensor:
    """Output of the layer with the weight `formed(W)`, exactly base(x) where that is W.

    Args:
        base: any kind of layer. A quantized one is called as its package computes it, and the difference is added.
        x: (..., d_in), or token ids for an embedding.
        formed: the new weight (*lead, d_out, d_in) of the frozen one, in its dtype, which is float32 at least;
            differentiable in what it reads of the adapter. It is called again in backward, so that it must be a
            function of the weight and of tensors that have not changed since.
    """
    if not isinstance(base, QuantizedBase):
        return _recomputed(base, x, formed)
    y = base(x)  # its dtype under autocast is the package's choice
    return y + _recomputed(base, x, formed).to(y.dtype)


def _recomputed(base: BaseLayer, x: Tensor, formed: Callable[[Tensor], Tensor]) -> Tensor:
    if not torch.is_grad_enabled():
        return _product(base, x, formed)
    y: Any = checkpoint(_product, base, x, formed, use_reentrant=False, preserve_rng_state=False)
    return cast(Tensor, y)


def _product(base: BaseLayer, x: Tensor, formed: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.autocast(base.device.type, enabled=False):
        weight = base.weight(base.adapter_dtype)
        if isinstance(base, QuantizedBase):
            return base.apply(x, (formed(weight) - weight).to(x.dtype))
        changed = formed(weight).to(base.dtype)
    return base.apply(x, changed, base.bias)
