"""One layer for tests: its base layer, and the layer with an adapter on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ll_lora import LoRA
from lora_lightning.adapters.adapted_layer import AdaptedLayer
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.methods import Method
from lora_lightning.testing import perturb
from lora_lightning.testing.toy_models import LAYERS


def base_of(kind: str = "Linear", dtype: torch.dtype = torch.float64) -> tuple[BaseLayer, Tensor]:
    """A base layer of a kind, and an input."""
    make_layer, make_input = LAYERS[kind]
    base, x = core_base_layer(make_layer().to(dtype)), make_input()
    assert base is not None
    return base, x.to(dtype) if x.is_floating_point() else x


def adapted(
    base: BaseLayer | str = "Linear", dtype: torch.dtype = torch.float32, method: Method | None = None
) -> AdaptedLayer:
    """A frozen layer, or one of that kind, with a perturbed adapter, LoRA by default."""
    base = base_of(base, dtype)[0] if isinstance(base, str) else base
    layer = AdaptedLayer(base)
    adapter = (method or LoRA(rank=2, alpha=4.0)).build(base)
    adapter.reset(torch.Generator().manual_seed(0))
    layer.add("default", adapter)
    perturb(adapter)
    return layer.requires_grad_(False)


def linear(d_in: int = 12, d_out: int = 10, dtype: torch.dtype = torch.float64) -> BaseLayer:
    """A frozen linear layer."""
    base = core_base_layer(nn.Linear(d_in, d_out, dtype=dtype).requires_grad_(False))
    assert base is not None
    return base
