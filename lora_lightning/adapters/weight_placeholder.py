"""A stand-in for a weight that no tensor states: it answers what it is like, and refuses to be computed with.

Models ask a layer for its dtype or device before they call it (`self.wo.weight.dtype`), and an adapter that depends on
its input has no weight to ask. The stand-in has no numbers, so nothing can compute with them past Python either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.quantized import QuantizedBase
from lora_lightning.errors import AdapterStateError

_FACTS: frozenset[Any] = frozenset(
    getattr(Tensor, name).__get__ for name in ("dtype", "shape", "ndim", "layout", "requires_grad", "is_leaf")
) | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.__len__}


class WeightPlaceholder(Tensor):
    """Dtype, device and shape of a weight, and the reason why it is none."""

    like: torch.device
    why: str

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer facts about the tensor; refuse the rest."""
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        mine = next((value for value in args if isinstance(value, WeightPlaceholder)), None)
        if mine is not None and func == Tensor.device.__get__:
            return mine.like
        why = mine.why if mine is not None else "an adapter depends on its input"
        raise AdapterStateError(f"{why}, so no single weight states it.")


def weight_placeholder(base: BaseLayer, why: str) -> Tensor:
    """A stand-in for the weight of a layer.

    Args:
        base: the layer; where its weight is quantized, the stand-in is like the plain layer's.
        why: which adapter has no weight.
    """
    shape = base.plain_shape if isinstance(base, QuantizedBase) else base.stored.shape
    with torch.no_grad():
        found = torch.empty(shape, dtype=base.dtype, device="meta").as_subclass(WeightPlaceholder)
    found.like, found.why = base.device, why
    return found
