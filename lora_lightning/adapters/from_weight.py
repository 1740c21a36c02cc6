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

from lora_lightning.adapters.layers.base import BaseLayer, StackedBase
from lora_lightning.adapters.layers.quantized import QuantizedBase
from lora_lightning.adapters.low_rank import factor_dtype


def forward_from_weight(base: BaseLayer, x: Tensor, formed: Callable[[Tensor], Tensor]) -> Tensor:
    """Output of the layer with the weight `formed(W)`, exactly base(x) where that is W.

    Args:
        base: any kind of layer. One that is more than a product with its weight, quantized or with other adapters on
            it, is called as it is, and the product with the difference is added.
        x: (..., d_in), or token ids for an embedding.
        formed: the new weight (*lead, d_out, d_in) of the frozen one, in its dtype, which is float32 at least;
            differentiable in what it reads of the adapter. It is called again in backward, so that it must be a
            function of the weight and of tensors that have not changed since.
    """
    if not isinstance(base, QuantizedBase | StackedBase):
        return _recomputed(_product, base, x, formed)
    y = base(x)  # its dtype under autocast is the package's choice
    return y + _recomputed(_difference, base, x, formed).to(y.dtype)


def _recomputed(product: Callable[..., Tensor], *inputs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return product(*inputs)
    return cast(Tensor, checkpoint(product, *inputs, use_reentrant=False, preserve_rng_state=False))


def _product(base: BaseLayer, x: Tensor, formed: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.autocast(base.device.type, enabled=False):
        weight = formed(base.weight(base.adapter_dtype)).to(base.dtype)
    return base.apply(x, weight, base.bias)


def _difference(base: BaseLayer, x: Tensor, formed: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.autocast(base.device.type, enabled=False):
        weight = base.weight(base.adapter_dtype)
        change = (formed(weight) - weight).to(factor_dtype(base, x))
    return base.apply(x, change)
