"""What every quantized base layer does alike, on a format of plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_quantized import RowScaledBase, RowScaledLinear

from lora_lightning.adapters.layers.quantized import flattened
from lora_lightning.errors import AdapterStateError


def base_of(dtype: torch.dtype = torch.float32, bias: bool = True) -> RowScaledBase:
    return RowScaledBase(RowScaledLinear(nn.Linear(6, 5, bias=bias, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_the_dequantized_one_in_the_plain_dtype(dtype: torch.dtype) -> None:
    base = base_of(dtype)
    module = base.module
    assert base.dtype == dtype
    assert torch.equal(base.weight(), (module.weight.float() * module.scale.float()).to(dtype))
    assert base.weight(torch.float64).dtype == torch.float64
    assert not base.weight().requires_grad
    assert base.adapter_dtype == torch.float32


def test_it_is_never_written() -> None:
    with pytest.raises(AdapterStateError, match="stored as row-scaled int8, which cannot be written"):
        base_of().write(torch.zeros(5, 6))


def test_the_plain_dtype_is_adopted_where_the_layer_does_not_tell() -> None:
    base = base_of()
    base.adopt(torch.bfloat16)
    assert base.dtype == torch.float32
    base.plain_dtype = None
    base.adopt(torch.bfloat16)
    assert base.dtype == torch.bfloat16


@pytest.mark.parametrize("own_backward", [True, False])
def test_the_gradient_is_that_of_the_dequantized_weight(own_backward: bool) -> None:
    base, x = base_of(), torch.randn(2, 3, 6, requires_grad=True)
    base.own_backward = own_backward
    y = base(x)
    assert torch.equal(y, base.module(x))
    G = torch.randn(y.shape)
    torch.testing.assert_close(torch.autograd.grad(y, x, G)[0], G @ base.weight())


def test_another_gradient_can_be_put_in() -> None:
    base, x = base_of(), torch.randn(3, 6, requires_grad=True)
    y = base.product(x, lambda G, weight: 2 * G @ weight)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 2 * torch.ones(3, 5) @ base.weight())


def test_hooks_are_seen() -> None:
    base, seen = base_of(), []
    assert base.bare
    base.module.register_forward_hook(lambda *_: seen.append(1))
    assert not base.bare
    base.own_backward = False
    base(torch.randn(2, 6))
    assert seen == [1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_plain_layer_computes_with_the_weight_that_is_given(transposed: bool, bias: bool) -> None:
    base, x = base_of(torch.bfloat16), torch.randn(3, 6)
    base.transposed = transposed
    weight, own_bias = torch.randn(5, 6), torch.randn(5) if bias else None
    plain = base.plain(weight, own_bias)
    assert plain.weight.shape == base.plain_shape
    assert plain.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in plain.parameters())
    y = plain(x)  # takes and gives any dtype, as the quantized layer does
    assert y.dtype == torch.float32
    rounded = None if own_bias is None else own_bias.bfloat16()
    expected = nn.functional.linear(x.bfloat16(), weight.bfloat16(), rounded)
    torch.testing.assert_close(y, expected.float(), rtol=2e-2, atol=2e-2)


def test_bytes_are_those_that_are_held() -> None:
    base = base_of()
    assert base.held == sum(part.numel() for part in flattened(base.stored)) == 5 * 6
