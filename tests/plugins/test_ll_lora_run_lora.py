"""RunLoRA's invariants (arXiv:2312.03415), each against plain autograd or an independent count."""

from __future__ import annotations

import copy
import importlib
import itertools
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ll_lora import LoRA, run_lora
from ll_lora.run_lora import (
    Needs,
    add_low_rank_cheaply,
    all_orders,
    backward_flops,
    choose,
    contract,
    forward_flops,
)
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.adapters.low_rank import LowRankAdapter, add_low_rank
from lora_lightning.testing import perturb

ALL = Needs(True, True, True)


def tensors(n: int, d_in: int, d_out: int, rank: int, dtype: torch.dtype, bias: bool = True) -> dict[str, Tensor]:
    return {
        "x": torch.randn(n, d_in, dtype=dtype, requires_grad=True),
        "weight": torch.randn(d_out, d_in, dtype=dtype),
        "bias": torch.randn(d_out, dtype=dtype) if bias else None,  # type: ignore[dict-item]
        "A": torch.randn(rank, d_in, dtype=dtype, requires_grad=True),
        "B": torch.randn(d_out, rank, dtype=dtype, requires_grad=True),
    }


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    y = x @ weight.T + scaling * (x @ A.T) @ B.T
    return y if bias is None else y + bias


@pytest.mark.parametrize("order", all_orders(), ids="-".join)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_every_order_equals_plain_autograd(order: tuple[str, str], bias: bool, transposed: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        given = tensors(9, 7, 5, 3, dtype, bias)
        if transposed:
            given["weight"] = given["weight"].T.contiguous().T
        G = torch.randn(9, 5, dtype=dtype)
        y, expected = contract(**given, scaling=0.3, order=order), plain(**given, scaling=0.3)
        wanted = [given["x"], given["A"], given["B"]]
        found = torch.autograd.grad(y, wanted, G)
        for a, b in zip([y, *found], [expected, *torch.autograd.grad(expected, wanted, G)], strict=True):
            assert float((a - b).detach().norm() / b.detach().norm()) < tolerance


def test_a_trained_bias_gets_its_gradient() -> None:
    given = tensors(9, 7, 5, 3, torch.float64)
    given["bias"].requires_grad_()
    contract(**given, scaling=1.0, order=("F1", "B1")).sum().backward()
    assert given["bias"].grad is not None
    assert torch.equal(given["bias"].grad, torch.full((5,), 9.0, dtype=torch.float64))


@pytest.mark.parametrize("order", all_orders(), ids="-".join)
def test_gradients_that_are_not_needed_are_none(order: tuple[str, str]) -> None:
    for needed in itertools.product([True, False], repeat=3):
        if not any(needed):
            continue
        given = tensors(9, 7, 5, 3, torch.float64)
        for name, need in zip(("x", "A", "B"), needed, strict=True):
            given[name].requires_grad_(need)
        contract(**given, scaling=0.3, order=order).sum().backward()
        assert [given[name].grad is not None for name in ("x", "A", "B")] == list(needed)


class MultiplyAdds(TorchDispatchMode):
    """Counts those of every matrix product that runs."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        else:
            assert not any(word in name for word in ("mm", "mv", "dot", "linear", "einsum")), name
        return func(*args, **(kwargs or {}))


SHAPES = [(9, 7, 5, 3), (2, 16, 4, 4), (40, 6, 6, 1), (33, 5, 8, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", all_orders(), ids="-".join)
def test_formulas_count_the_multiply_adds_that_are_made(
    shape: tuple[int, int, int, int], order: tuple[str, str]
) -> None:
    for needs in [
        ALL,
        Needs(False, True, True),
        Needs(True, True, False),
        Needs(True, False, True),
        Needs(True, False, False),
    ]:
        given = tensors(*shape, torch.float64)
        for name, need in zip(("x", "A", "B"), needs, strict=True):
            given[name].requires_grad_(need)
        with MultiplyAdds() as forward:
            y = contract(**given, scaling=0.3, order=order)
        with MultiplyAdds() as backward:
            y.backward(torch.ones_like(y))
        assert 2 * forward.count == forward_flops(*shape)[order[0]]
        assert 2 * backward.count == backward_flops(*shape, needs)[order[1]]


def test_backward_formulas_are_those_of_the_paper() -> None:
    n, d_in, d_out, r = 11, 7, 5, 3
    P, a, b, m = n * d_in * d_out, n * r * d_in, n * r * d_out, r * d_in * d_out
    assert backward_flops(n, d_in, d_out, r, ALL) == {
        "B1": 2 * (P + 3 * a + 2 * b),
        "B2": 2 * (2 * P + 2 * a + b + m),
        "B3": 2 * (2 * P + a + b + 2 * m),
        "B4": 2 * (2 * P + 3 * m),
        "B5": 2 * (P + 2 * a + 2 * b + m),
        "B6": 2 * (2 * P + 2 * a + 2 * b + m),
        "B7": 2 * (2 * P + a + b + 2 * m),
        "B8": 2 * (2 * P + a + b + 2 * m),
    }


@pytest.mark.parametrize(("d_in", "d_out", "r"), [(12, 10, 4), (64, 64, 8), (30, 90, 2)])
def test_crossovers(d_in: int, d_out: int, r: int) -> None:
    for n in range(1, 200):
        forwards, backwards = forward_flops(n, d_in, d_out, r), backward_flops(n, d_in, d_out, r, ALL)
        assert (forwards["F2"] < forwards["F1"]) == (n > d_in * d_out / (d_in + d_out))
        assert (backwards["B5"] < backwards["B1"]) == (n > d_out)


@pytest.mark.parametrize(
    ("n", "d_in", "d_out", "r", "chosen"),
    [
        (6, 12, 10, 4, ("F2", "B1")),
        (16, 12, 10, 4, ("F2", "B5")),
        (2048, 4096, 4096, 16, ("F1", "B1")),
        (2049, 4096, 4096, 16, ("F2", "B1")),
        (8192, 4096, 4096, 16, ("F2", "B5")),
    ],
)
def test_chooser(n: int, d_in: int, d_out: int, r: int, chosen: tuple[str, str]) -> None:
    assert choose(n, d_in, d_out, r, ALL) == chosen


def test_choice_is_the_cheapest_and_leaves_out_what_is_not_needed() -> None:
    for shape in SHAPES:
        for needs in itertools.starmap(Needs, itertools.product([True, False], repeat=3)):
            forward, backward = choose(*shape, needs)
            assert forward_flops(*shape)[forward] == min(forward_flops(*shape).values())
            costs = backward_flops(*shape, needs)
            assert costs[backward] == min(costs.values())
            if not any(needs):
                assert set(costs.values()) == {0}


def test_half_precision_never_forms_the_merged_weight() -> None:
    for n in (1, 100, 10_000):
        forward, backward = choose(n, 12, 10, 4, ALL, merged=False)
        assert forward == "F1"
        assert not run_lora.BACKWARDS[backward].dX_merged


class Spy:
    """Records what the chooser is asked and answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, tuple[str, str]]] = []
        monkeypatch.setattr(run_lora, "choose", self)

    def __call__(self, n: int, *args: int, merged: bool = True) -> tuple[str, str]:
        order = choose(n, *args, merged=merged)  # type: ignore[arg-type]
        self.seen.append((n, order))
        return order


def layer(
    dropout: float = 0.0, dtype: torch.dtype = torch.float32, d_in: int = 12, d_out: int = 10, bias: bool = True
) -> tuple[LowRankAdapter, BaseLayer]:
    base = core_base_layer(nn.Linear(d_in, d_out, bias).to(dtype).requires_grad_(False))
    assert base is not None
    adapter = LowRankAdapter(
        base, rank=4, scaling=0.5, dropout=dropout, product=add_low_rank_cheaply, rank_pruning=True
    )
    perturb(adapter)
    return adapter, base


def test_choice_follows_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, (adapter, base) = Spy(monkeypatch), layer()
    for shape in ((6, 12), (2, 8, 12), (12,)):
        adapter(torch.randn(shape, requires_grad=True), base)
    assert spy.seen == [(6, ("F2", "B1")), (16, ("F2", "B5")), (1, ("F1", "B1"))]


def test_dropout_restricts_the_choice_while_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, (adapter, base) = Spy(monkeypatch), layer(dropout=0.5)
    x = torch.randn(16, 12)
    adapter.train()(x, base)
    assert spy.seen == []
    y = adapter.eval()(x, base)
    assert len(spy.seen) == 1
    torch.testing.assert_close(y, base.apply(x, adapter.merged_weight(base.weight()), base.bias))


def test_autocast_and_half_precision_stay_with_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, (adapter, base) = Spy(monkeypatch), layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert adapter(torch.randn(100, 12), base).dtype == torch.bfloat16
    assert spy.seen == []
    adapter, base = layer(dtype=torch.bfloat16)
    adapter(torch.randn(100, 12).bfloat16(), base)
    assert spy.seen[0][1][0] == "F1"


def test_hooks_on_the_layer_are_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, (adapter, base) = Spy(monkeypatch), layer()
    x, seen = torch.randn(16, 12), []
    expected = adapter(x, base)
    base.module.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(adapter(x, base), expected)
    assert seen == [1]
    assert len(spy.seen) == 1


def saved_bytes(adapter: LowRankAdapter, base: BaseLayer, x: Tensor) -> dict[tuple[int, ...], int]:
    """Bytes that autograd keeps beside the parameters and `x`, by shape."""
    known = {p.untyped_storage().data_ptr() for p in [*adapter.parameters(), *base.module.parameters(), x]}
    found: dict[int, tuple[tuple[int, ...], int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (tuple(tensor.shape), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = adapter(x, base)
    kept = dict(found.values())
    y.sum().backward()
    return kept


@pytest.mark.parametrize("n", [3, 64, 500])
def test_nothing_but_the_input_is_kept_for_backward(n: int) -> None:
    """No x A^T, no merged weight: beside x and the parameters only the masked factor and the rank mask, for any N."""
    adapter, base = layer(d_in=32, d_out=24)
    kept = saved_bytes(adapter, base, torch.randn(n, 32, requires_grad=True))
    assert kept == {(4, 32): 4 * 32 * 4, (4, 1): 4}
    adapter.product = add_low_rank
    assert saved_bytes(adapter, base, torch.randn(n, 32, requires_grad=True))[(n, 4)] == n * 4 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(200, 48), (4, 50, 48), (3, 48), (48,)])
@pytest.mark.parametrize("bias", [True, False])
def test_start_is_the_base_output_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    adapter, base = layer(dtype=dtype, d_in=48, d_out=64, bias=bias)
    adapter.reset(torch.Generator().manual_seed(0))
    x = torch.randn(shape, dtype=dtype)
    assert torch.equal(adapter(x, base), base(x))


@pytest.mark.parametrize("shape", [(4, 12), (2, 4, 12)])
def test_the_output_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    """As `nn.ReLU(inplace=True)` does after a layer."""
    adapter, base = layer(dtype=torch.float64)
    x, gradients = torch.randn(shape, dtype=torch.float64, requires_grad=True), []
    for activation in (torch.relu, torch.relu_):
        y = adapter(x, base)
        assert y._base is None or len(shape) > 2
        gradients.append(torch.autograd.grad(activation(y).sum(), [x, *adapter.parameters()]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", ["autograd", "flops"])
def test_the_setting_hands_in_the_product(order: str) -> None:
    base = core_base_layer(nn.Linear(12, 10))
    assert base is not None
    adapter = LoRA(rank=2, order=order).build(base)  # type: ignore[arg-type]
    assert adapter.product is {"autograd": add_low_rank, "flops": add_low_rank_cheaply}[order]
    assert copy.deepcopy(adapter).product is adapter.product
    # a pickle names a function by where it stands, and a reader finds it there again
    product = adapter.product
    assert operator.attrgetter(product.__qualname__)(importlib.import_module(product.__module__)) is product
