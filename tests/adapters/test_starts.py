"""Starts from weights, covariances and gradients, against numpy; and starts that are subtracted."""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import pytest
import torch
from miniatures import installed
from miniatures.starts import PiSSA
from torch import nn

from lora_lightning import eject, inject, load_adapter, merge, save_adapter, unmerge
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.adapters.low_rank import LowRankAdapter
from lora_lightning.adapters.starts import (
    covariance_start,
    gradient_start,
    singular,
    weight_start,
)
from lora_lightning.errors import SettingsError
from lora_lightning.exporters.export import export
from lora_lightning.injection.records import adapters_named
from lora_lightning.testing import TinyMLP, perturb


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scaling", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_a_weight_start_is_the_best_approximation(shape, scaling):
    W = drawn(*shape)
    A, B = weight_start(W, 2, scaling)
    U, S, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    np.testing.assert_allclose((scaling * B @ A).numpy(), U[:, :2] * S[:2] @ Vh[:2], atol=1e-12)
    assert float(torch.linalg.matrix_norm(W - scaling * B @ A, 2)) == pytest.approx(S[2])  # sigma_{r+1}
    torch.testing.assert_close(A @ A.mT, torch.diag(torch.from_numpy(S[:2]) / scaling), rtol=0, atol=1e-12)
    torch.testing.assert_close(B.mT @ B, torch.diag(torch.from_numpy(S[:2]) / scaling), rtol=0, atol=1e-12)


def test_leading_and_trailing_parts_add_up_to_the_weight():
    W = drawn(4, 6)
    leading, trailing = weight_start(W, 1, 2.0), weight_start(W, 3, 2.0, part="trailing")
    torch.testing.assert_close(2 * (leading.B @ leading.A + trailing.B @ trailing.A), W, rtol=0, atol=1e-12)


def test_stacked_experts_start_one_by_one():
    W = drawn(3, 5, 6)
    A, B = weight_start(W, 2, 1.0)
    for i in range(3):
        one = weight_start(W[i], 2, 1.0)
        torch.testing.assert_close(B[i] @ A[i], one.B @ one.A, rtol=0, atol=1e-12)


def test_signs_do_not_depend_on_the_solver():
    W = drawn(5, 7)
    U, S, Vh = singular(W)
    torch.testing.assert_close(U * S @ Vh, W, rtol=0, atol=1e-12)
    assert bool((Vh.gather(-1, Vh.abs().argmax(-1, keepdim=True)) > 0).all())
    flipped = singular(-W)  # the left vectors carry the sign
    torch.testing.assert_close(flipped[2], Vh, rtol=0, atol=1e-12)
    assert singular(W.float())[0].dtype == torch.float64


def test_a_covariance_start_spans_the_inputs_directions():
    subspace = torch.linalg.qr(drawn(8, 3))[0].mT
    x = drawn(400, 3, seed=1) * torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64) @ subspace
    A, values = covariance_start(x.mT @ x / len(x), 3)
    torch.testing.assert_close(A @ A.mT, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(A.mT @ A, subspace.mT @ subspace, rtol=0, atol=1e-10)
    expected = np.linalg.svd(x.numpy(), compute_uv=False)[:3] ** 2 / len(x)
    np.testing.assert_allclose(values[:3].numpy(), expected)


def test_a_gradient_start_takes_each_direction_once():
    G = drawn(6, 9)
    A, B = gradient_start(G, 2)
    U, _, Vh = np.linalg.svd(G.numpy())
    np.testing.assert_allclose((A.mT @ A).numpy(), Vh[:2].T @ Vh[:2], atol=1e-12)
    np.testing.assert_allclose((B @ B.mT).numpy(), U[:, 2:4] @ U[:, 2:4].T, atol=1e-12)
    wide = gradient_start(G, 4)  # 6 directions, too few for 4 and 4
    np.testing.assert_allclose((wide.B @ wide.B.mT).numpy(), U[:, :4] @ U[:, :4].T, atol=1e-12)


# -- starts that are subtracted ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _installed():
    with installed(PiSSA):
        yield


def started(dtype: torch.dtype = torch.float64, alpha: float = 3.0) -> tuple[TinyMLP, TinyMLP, torch.Tensor]:
    plain = TinyMLP().to(dtype).eval()
    model = copy.deepcopy(plain)
    inject(model, PiSSA(rank=2, alpha=alpha), ["first", "second"], also_train=(), seed=0)
    return plain, model, drawn(5, 6).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_function_is_unchanged_to_the_bit_and_the_weight_is_never_written(dtype):
    plain, model, x = started(dtype)
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model.first.base.weight, plain.first.weight)
    adapter = cast(LowRankAdapter, model.first.adapter("default"))
    product = 1.5 * adapter.lora_B.double() @ adapter.lora_A.double()
    U, S, Vh = torch.linalg.svd(plain.first.weight.double(), full_matrices=False)
    torch.testing.assert_close(
        product, U[:, :2] * S[:2] @ Vh[:2], rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5
    )


def test_training_computes_what_a_residual_weight_would():
    """The paper's form: W_res = W - s B0 A0 is written, and s B A added."""
    plain, model, x = started()
    for adapter in adapters_named(model, "default").values():
        perturb(adapter, seed=3)
    residual = copy.deepcopy(plain)
    with torch.no_grad():
        for name in ("first", "second"):
            adapter = cast(LowRankAdapter, getattr(model, name).adapter("default"))
            W = getattr(plain, name).weight
            getattr(residual, name).weight.copy_(
                W - 1.5 * adapter.start_B @ adapter.start_A + 1.5 * adapter.lora_B @ adapter.lora_A
            )
    torch.testing.assert_close(model(x), residual(x), rtol=0, atol=1e-12)


def test_merge_unmerge_save_and_export_stay_exact(tmp_path):
    plain, model, x = started()
    for adapter in adapters_named(model, "default").values():
        perturb(adapter, seed=3)
    adapted = model(x)
    merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-12)
    unmerge(model)
    assert torch.equal(model(x), adapted)
    save_adapter(model, tmp_path / "adapter")
    fresh = copy.deepcopy(plain)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), adapted)
    A, B = adapters_named(model, "default")["first"].low_rank()
    assert A.shape == (4, 6)  # rank 2 r on the untouched base
    torch.testing.assert_close(plain.first.weight + B @ A, merged_weight(model), rtol=0, atol=1e-12)
    report = export(model, tmp_path / "peft", "peft")
    assert "rank" in str(report) or (tmp_path / "peft").is_dir()
    eject(model)
    assert torch.equal(model(x), plain(x))


def merged_weight(model: TinyMLP) -> torch.Tensor:
    layer = model.first
    return layer.merged_weight("default", torch.float64)


def test_dropout_acts_on_the_trained_product_alone():
    base = cast(BaseLayer, core_base_layer(nn.Linear(6, 5).double()))
    adapter = LowRankAdapter(base, rank=2, scaling=1.0, dropout=0.5)
    adapter.hold_start()
    adapter.start_at(weight_start(base.weight(), 2, 1.0))
    x = drawn(4, 6)
    torch.manual_seed(1)
    y = adapter.train()(x, base)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    product = adapter.start_B @ adapter.start_A
    torch.testing.assert_close(y, base(x) + (dropped - x) @ product.mT, rtol=0, atol=1e-12)


def test_a_start_that_is_no_number_is_refused():
    base = cast(BaseLayer, core_base_layer(nn.Linear(6, 5)))
    adapter = LowRankAdapter(base, rank=2, scaling=1.0)
    adapter.hold_start()
    factors = weight_start(base.weight(), 2, 1.0)
    with pytest.raises(SettingsError, match="factor A holds values that are not finite"):
        adapter.start_at(factors._replace(A=factors.A * float("nan")))
