from __future__ import annotations

import pytest
import torch
from one_layer import base_of
from torch import nn
from toy_quantized import RowScaledBase, RowScaledLinear

from lora_lightning.adapters.weight_placeholder import weight_placeholder
from lora_lightning.errors import AdapterStateError


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d"])
def test_it_answers_what_the_weight_is_like(kind: str) -> None:
    base = base_of(kind, torch.bfloat16)[0]
    found, weight = weight_placeholder(base, "x"), base.stored
    assert (found.dtype, found.device, found.shape) == (weight.dtype, weight.device, weight.shape)
    assert (found.size(0), found.dim(), found.numel(), len(found)) == (
        len(weight),
        weight.dim(),
        weight.numel(),
        len(weight),
    )
    assert found.is_floating_point()
    assert not found.requires_grad


def test_of_a_quantized_layer_it_is_like_the_plain_weight() -> None:
    found = weight_placeholder(RowScaledBase(RowScaledLinear(nn.Linear(6, 5).bfloat16())), "x")
    assert (found.shape, found.dtype) == ((5, 6), torch.bfloat16)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w + 1,
        lambda w: torch.ones(2, 6) @ w.T,
        lambda w: nn.functional.linear(torch.ones(2, 6), w),
        lambda w: w.sum(),
        lambda w: w.tolist(),
        lambda w: w.to("cpu"),
    ],
)
def test_it_refuses_to_be_computed_with(use: object) -> None:
    found = weight_placeholder(base_of("Linear", torch.float32)[0], 'adapter "a" depends on its input')
    with pytest.raises(AdapterStateError, match='adapter "a" depends on its input, so no single weight states it'):
        use(found)  # type: ignore[operator]
