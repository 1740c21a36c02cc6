"""What every base layer does alike, and layers with an adapter as bases of the next."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from one_layer import base_of
from torch import Tensor, nn

from lora_lightning.adapters.layers.base import BaseAround, StackedBase, add_product, plus_product
from lora_lightning.adapters.low_rank import LowRankAdapter
from lora_lightning.testing import BASE_KINDS, perturb


def test_cached_is_computed_again_only_after_a_write() -> None:
    base, _ = base_of("Linear")
    calls = 0

    def norms(weight: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return weight.norm(dim=1)

    first = base.cached("norms", norms)
    assert base.cached("norms", norms) is first
    base.write(2 * base.weight())
    assert torch.allclose(base.cached("norms", norms), 2 * first)
    base.stored.data = base.stored.data.clone()
    base.cached("norms", norms)
    assert calls == 3
    assert not base.cached("norms", norms).requires_grad


def test_a_base_layer_reads_the_module_not_a_parameter_kept_from_before() -> None:
    base, _ = base_of("Linear")
    module: Any = base.module
    module.weight = nn.Parameter(torch.zeros(5, 6, dtype=torch.float64))
    assert not base.weight().any()
    twin = copy.deepcopy(base)
    assert twin.module is not base.module


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_a_layer_with_an_adapter_is_a_base_for_the_next(kind: str) -> None:
    base, x = base_of(kind)
    first, second = LowRankAdapter(base, rank=2, scaling=1.0), LowRankAdapter(base, rank=3, scaling=0.5)
    perturb(first, 1)
    perturb(second, 2)
    stacked = StackedBase(base, first)
    assert not stacked.dense
    weight = second.merged_weight(stacked.weight())
    torch.testing.assert_close(
        weight, base.weight() + first.lora_B @ first.lora_A + 0.5 * second.lora_B @ second.lora_A
    )
    torch.testing.assert_close(second(x, stacked), stacked.apply(x, weight, stacked.bias))
    norms = stacked.cached("norms", lambda weight: weight.norm())
    perturb(first, 3)
    assert stacked.cached("norms", lambda weight: weight.norm()) != norms


class Doubled(BaseAround):
    """The layer, called twice as loud."""

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * self.wrapped(x)


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_a_base_around_another_differs_in_its_call_only(kind: str) -> None:
    base, x = base_of(kind)
    around = Doubled(base)
    assert torch.equal(around(x), 2 * base(x))
    assert (around.kind, around.d_in, around.d_out, around.lead) == (base.kind, base.d_in, base.d_out, base.lead)
    assert torch.equal(around.weight(), base.weight())
    assert around.weight_name("a.b") == base.weight_name("a.b")
    assert torch.equal(around.apply(x, base.weight(), base.bias), base.apply(x, base.weight(), base.bias))
    assert around.cached("norm", torch.linalg.norm) is base.cached("norm", torch.linalg.norm)


def test_the_pretrained_weight_is_the_one_that_the_owner_reads() -> None:
    base, _ = base_of("Linear")
    assert torch.equal(base.pretrained_weight(torch.float64), base.weight())
    base.read_pretrained = lambda dtype: torch.ones(5, 6, dtype=dtype)
    assert torch.equal(base.pretrained_weight(torch.float32), torch.ones(5, 6))
    assert torch.equal(Doubled(base).pretrained_weight(torch.float32), torch.ones(5, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_trained_tensors_are_float32_at_least(dtype: torch.dtype) -> None:
    base, _ = base_of("Experts", dtype)
    assert base.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert base.zeros(2, 6).dtype == base.zeros_like_weight().dtype == base.adapter_dtype == wide
    assert (base.zeros(2, 6).shape, base.zeros_like_weight().shape) == ((3, 2, 6), (3, 5, 6))


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)])
def test_products_are_added_for_any_leading_axes(shape: tuple[int, ...]) -> None:
    onto, h, B = torch.randn(shape), torch.randn(*shape[:-1], 2), torch.randn(4, 2)
    torch.testing.assert_close(add_product(onto, h, B, 0.5), onto + 0.5 * h @ B.T)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_products_are_added_to_matrices_and_stacks(lead: tuple[int, ...]) -> None:
    onto, left, right = torch.randn(*lead, 4, 5), torch.randn(*lead, 4, 2), torch.randn(*lead, 2, 5)
    torch.testing.assert_close(plus_product(onto, left, right, 0.5), onto + 0.5 * left @ right)
