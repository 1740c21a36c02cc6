from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from lora_lightning.adapters import low_rank
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.adapters.low_rank import LowRankAdapter, add_low_rank, dropped_product, keep_mask
from lora_lightning.errors import SettingsError
from lora_lightning.testing import perturb


def linear(d_in: int = 12, d_out: int = 10, dtype: torch.dtype = torch.float64) -> BaseLayer:
    base = core_base_layer(nn.Linear(d_in, d_out, dtype=dtype).requires_grad_(False))
    assert base is not None
    return base


def embedding() -> BaseLayer:
    base = core_base_layer(nn.Embedding(11, 6).requires_grad_(False))
    assert base is not None
    return base


# -- the mask of dropout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
def test_keep_mask_keeps_the_stated_share(dropout: float) -> None:
    n = 400_000
    mask = keep_mask(torch.empty(4, n // 4), dropout)
    assert mask.dtype == torch.uint8
    assert mask.shape == (4, n // 4)
    assert set(mask.unique().tolist()) <= {0, 1}
    deviation = math.sqrt(dropout * (1 - dropout) / n)
    assert abs(float(mask.double().mean()) - (1 - dropout)) < 5 * deviation + 1 / 65536


def test_keep_mask_decides_entry_by_entry() -> None:
    """Four decisions come from one draw: they must not depend on one another."""
    lanes = keep_mask(torch.empty(100_000, 4), 0.5).double()
    correlation = torch.corrcoef(lanes.T) - torch.eye(4, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(100_000)


@pytest.mark.parametrize("dropout", [1e-9, 1e-6, 7e-6])
def test_a_tiny_dropout_does_not_drop_everything(dropout: float) -> None:
    assert float(keep_mask(torch.empty(10_000), dropout).double().mean()) > 0.999


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 3), (0, 4)])
def test_keep_mask_takes_any_shape(shape: tuple[int, ...]) -> None:
    assert keep_mask(torch.empty(shape), 0.3).shape == shape


# -- the product with dropout ------------------------------------------------------------------------------------------


def given(shape: tuple[int, ...] = (7, 5), d_out: int = 4, r: int = 3) -> list[Tensor]:
    y = torch.randn(*shape[:-1], d_out, dtype=torch.float64)
    x, A = torch.randn(shape, dtype=torch.float64), torch.randn(r, shape[-1], dtype=torch.float64)
    return [t.requires_grad_() for t in (y, x, A, torch.randn(d_out, r, dtype=torch.float64))]


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5)])
def test_dropped_product_equals_the_formula(shape: tuple[int, ...]) -> None:
    y, x, A, B = given(shape)
    mask = keep_mask(x, 0.4)
    expected = y + 1.7 * ((x * mask) @ A.T) @ B.T
    found = dropped_product(y, x, mask, A, B, 1.7)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    G = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, [y, x, A, B], G), torch.autograd.grad(expected, [y, x, A, B], G), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_dropped_product_passes_gradcheck() -> None:
    y, x, A, B = given()
    mask = keep_mask(x, 0.4)
    assert gradcheck(lambda *tensors: dropped_product(tensors[0], tensors[1], mask, *tensors[2:], 1.7), (y, x, A, B))


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}])
@pytest.mark.parametrize("shape", [(4, 12), (2, 4, 12)])
def test_the_output_may_be_changed_in_place(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    """As `nn.ReLU(inplace=True)` does after a layer."""
    base = linear()
    adapter = LowRankAdapter(base, rank=2, scaling=0.5, **options)
    perturb(adapter)
    x, gradients = torch.randn(shape, dtype=torch.float64, requires_grad=True), []
    for activation in (torch.relu, torch.relu_):
        torch.manual_seed(0)
        y = adapter(x, base)
        assert y._base is None or len(shape) > 2
        gradients.append(torch.autograd.grad(activation(y).sum(), [x, *adapter.parameters()]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_dropped_product_leaves_out_gradients_that_are_not_needed() -> None:
    for needed in itertools.product([True, False], repeat=4):
        tensors = [t.detach().requires_grad_(need) for t, need in zip(given(), needed, strict=True)]
        out = dropped_product(tensors[0], tensors[1], keep_mask(tensors[1], 0.4), *tensors[2:], 1.7)
        if any(needed):
            out.sum().backward()
        assert [t.grad is not None for t in tensors] == list(needed)


@pytest.mark.parametrize("start", ["float32", "bfloat16"])
def test_dropped_product_under_autocast(start: str) -> None:
    """Output and gradients are those of bfloat16 arithmetic, parameter gradients in the parameter's dtype."""
    dtype = getattr(torch, start)
    y, x, A, B = (t.detach().to(dtype) for t in given((64, 32), 16, 4))
    y, A, B = y.bfloat16(), A.float(), B.float()
    x, A, B = x.requires_grad_(), A.requires_grad_(), B.requires_grad_()
    mask = keep_mask(x, 0.4)
    with torch.autocast("cpu", torch.bfloat16):
        out = dropped_product(y, x, mask, A, B, 1.7)
    assert out.dtype == torch.bfloat16
    wide = [t.detach().double().requires_grad_() for t in (x, A, B)]
    expected = y.double() + 1.7 * ((wide[0] * mask) @ wide[1].T) @ wide[2].T
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=0.3)
    out.sum().backward()
    expected.sum().backward()
    for tensor, reference in zip((x, A, B), wide, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        error = (tensor.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert float(error) < 0.02


def test_dropout_of_an_adapter_is_on_the_branch_only_and_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    base = linear()
    adapter = LowRankAdapter(base, rank=4, scaling=0.5, dropout=0.25)
    perturb(adapter)
    x = torch.randn(3, 12, dtype=torch.float64)
    mask = keep_mask(x, 0.25)
    monkeypatch.setattr(low_rank, "keep_mask", lambda x, dropout: mask)
    branch = 0.5 * (x * mask / 0.75) @ adapter.lora_A.T @ adapter.lora_B.T
    torch.testing.assert_close(adapter.train()(x, base), base(x) + branch)
    torch.testing.assert_close(adapter.eval()(x, base), base(x) + 0.5 * x @ adapter.lora_A.T @ adapter.lora_B.T)


def test_dropout_of_a_convolution_acts_on_its_input() -> None:
    base = core_base_layer(nn.Conv2d(2, 6, 3))
    assert base is not None
    adapter = LowRankAdapter(base, rank=2, scaling=0.5, dropout=0.25)
    perturb(adapter)
    x = torch.randn(1, 2, 5, 5)
    torch.manual_seed(1)
    found = adapter.train()(x, base)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.25)
    torch.testing.assert_close(found, base(x) + base.apply(dropped, 0.5 * adapter.lora_B @ adapter.lora_A))


def kept_bytes(adapter: LowRankAdapter, base: BaseLayer, x: Tensor) -> dict[int, int]:
    """What a training forward keeps for backward beside the factors and the frozen layer: bytes by place in memory."""
    known = {t.untyped_storage().data_ptr() for t in [adapter.lora_A, adapter.lora_B, *base.module.parameters()]}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapter.train()(x, base)
    return sizes


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("train", ["both", "B"])
def test_a_forward_keeps_few_bytes_and_with_a_frozen_A_not_even_its_input(train: str, dropout: float) -> None:
    """LoRA-FA's saving: r numbers a token, and with dropout a byte an entry of x, where x itself is not needed."""
    base = linear(64, 32, torch.float32)
    adapter = LowRankAdapter(base, rank=2, scaling=0.5, dropout=dropout, train=train)  # type: ignore[arg-type]
    x = torch.randn(100, 64, requires_grad=True)
    kept = kept_bytes(adapter, base, x)
    assert (kept.pop(x.untyped_storage().data_ptr(), 0) > 0) == (train == "both")
    mask, h = (100 * 64 + 8) * bool(dropout), 100 * 2 * 4  # keep_mask draws eight bytes at a time
    assert sum(kept.values()) <= mask + h


# -- the shared product ------------------------------------------------------------------------------------------------


def test_weights_of_the_rank_components_per_token() -> None:
    base = linear()
    x, w = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    A, B = torch.randn(3, 12, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    expected = base(x) + torch.einsum("blr,or->blo", w * (x @ A.T), B)
    torch.testing.assert_close(add_low_rank(base, x, A, B, w), expected)
    torch.testing.assert_close(add_low_rank(base, x, A, B, 2), base(x) + 2 * x @ A.T @ B.T)


def test_the_product_makes_no_second_tensor_of_the_size_of_the_output() -> None:
    base = linear(8, 4096, torch.float32)
    adapter = LowRankAdapter(base, rank=2, scaling=0.5)
    x = torch.randn(64, 8)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        adapter(x, base)
    large = [e for e in profile.events() if e.name == "[memory]" and e.self_cpu_memory_usage >= 64 * 4096 * 4]
    assert len(large) <= 2  # what the layer returns, and the sum


# -- one adapter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["both", "A", "B"])
@pytest.mark.parametrize("start", ["kaiming", "gaussian"])
def test_start_values(train: str, start: str) -> None:
    base = linear(300, 200, torch.float32)
    adapter = LowRankAdapter(base, rank=100, scaling=1.0, train=train, start=start)  # type: ignore[arg-type]
    adapter.reset(torch.Generator().manual_seed(0))
    zero, random = (adapter.lora_A, adapter.lora_B) if train == "A" else (adapter.lora_B, adapter.lora_A)
    assert not zero.any()
    assert isinstance(zero, nn.Parameter)
    if start == "gaussian":
        assert float(random.detach().std()) == pytest.approx(1 / 100, rel=0.03)
        assert float(random.mean().detach()) == pytest.approx(0, abs=2e-4)
    else:
        bound = 1 / math.sqrt(random.shape[1])
        assert float(random.detach().abs().max()) == pytest.approx(bound, rel=0.01)
        assert float(random.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize(
    ("train", "parameters"), [("both", {"lora_A", "lora_B"}), ("A", {"lora_A"}), ("B", {"lora_B"})]
)
def test_the_side_that_does_not_train_is_a_buffer(train: str, parameters: set[str]) -> None:
    adapter = LowRankAdapter(linear(), rank=2, scaling=1.0, train=train)  # type: ignore[arg-type]
    assert {name for name, _ in adapter.named_parameters()} == parameters
    assert set(adapter.state_dict()) == {"lora_A", "lora_B"}
    assert {id(t) for t in (adapter.factor_pairs()[0].lora_A, adapter.factor_pairs()[0].lora_B)} == {
        id(adapter.lora_A),
        id(adapter.lora_B),
    }


def test_tokens_that_were_never_seen_keep_their_vectors() -> None:
    base = embedding()
    adapter = LowRankAdapter(base, rank=2, scaling=1.0)
    adapter.reset(torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapter(torch.tensor([1, 4]), base).square().sum().backward()
        optimizer.step()
    moved = (adapter(torch.arange(11), base) != base(torch.arange(11))).any(1)
    assert moved.nonzero().flatten().tolist() == [1, 4]


def test_rank_scores_are_the_norms_of_the_components() -> None:
    adapter = LowRankAdapter(linear(), rank=3, scaling=1.0, rank_pruning=True)
    perturb(adapter)
    norms = [torch.linalg.norm(torch.outer(adapter.lora_B[:, j], adapter.lora_A[j])) for j in range(3)]
    torch.testing.assert_close(adapter.rank_scores(), torch.stack(norms).detach())
    assert LowRankAdapter(linear(), rank=3, scaling=1.0).rank_scores() is None


def test_entry_masks_are_of_the_trained_sides_rows_and_columns() -> None:
    adapter = LowRankAdapter(linear(), rank=3, scaling=1.0, entry_masks=True)
    first, second = adapter.masks()
    assert (first.param is adapter.lora_A, first.along) == (True, -1)
    assert (second.param is adapter.lora_B, second.along) == (True, -2)
    assert {first.effect, second.effect} == {"zero"}
    one_sided = LowRankAdapter(linear(), rank=3, scaling=1.0, entry_masks=True, train="B")
    assert [mask.param is one_sided.lora_B for mask in one_sided.masks()] == [True]
    first.mask[0, 0] = False
    adapter.reset(torch.Generator())
    assert bool(first.mask.all())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (embedding, {"rank": 2, "dropout": 0.1}, "dropout is 0.1; an embedding has token ids as input"),
        (embedding, {"rank": 2, "bias": True}, "bias is True; an embedding has no bias to add to"),
    ],
)
def test_settings_a_layer_cannot_have(make: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        LowRankAdapter(make(), scaling=1.0, **options)  # type: ignore[operator, arg-type]


def test_print_shows_rank_and_scaling() -> None:
    assert "rank=3, scaling=0.5" in repr(LowRankAdapter(linear(), rank=3, scaling=0.5))
