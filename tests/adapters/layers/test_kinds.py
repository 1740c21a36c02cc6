from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from one_layer import base_of
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.adapters.layers.base import BaseLayer
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.adapters.low_rank import LowRankAdapter, add_low_rank
from lora_lightning.testing import BASE_KINDS, perturb
from lora_lightning.testing.toy_models import seeded


def dense(base: BaseLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's output from a (d_out, d_in) weight, written with torch's own functions."""
    module: Any = base.module
    if base.kind == "linear":
        return F.linear(x, weight, bias)
    if base.kind == "experts":
        each = [F.linear(*three) for three in zip(x, weight, [None] * len(x) if bias is None else bias, strict=True)]
        return torch.stack(each)
    if base.kind == "embedding":
        return weight.T[x]
    conv = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
    kernel = weight.reshape(module.weight.shape)
    return conv(x, kernel, bias, module.stride, module.padding, module.dilation, module.groups)


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_weight_is_the_one_the_layer_applies(kind: str) -> None:
    base, x = base_of(kind)
    weight = base.weight()
    assert weight.shape == (*base.lead, base.d_out, base.d_in)
    assert weight.untyped_storage().data_ptr() == base.stored.untyped_storage().data_ptr()
    assert base.weight(torch.float32).dtype == torch.float32
    torch.testing.assert_close(base(x), dense(base, x, weight, base.bias))


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_apply_takes_another_weight_and_bias(kind: str) -> None:
    base, x = base_of(kind)
    weight = torch.randn(*base.lead, base.d_out, base.d_in, dtype=torch.float64)
    before = base.stored.clone()
    torch.testing.assert_close(base.apply(x, weight), dense(base, x, weight, None))
    if base.kind not in ("embedding", "experts"):
        bias = torch.randn(base.d_out, dtype=torch.float64)
        torch.testing.assert_close(base.apply(x, weight, bias), dense(base, x, weight, bias))
    assert torch.equal(base.stored, before)


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_write_rounds_once_and_moves_the_version(kind: str) -> None:
    base, _ = base_of(kind, torch.bfloat16)
    stored, version = base.stored, base.version
    weight = torch.randn(*base.lead, base.d_out, base.d_in)
    base.write(weight)
    assert base.stored is stored
    assert torch.equal(base.weight(), weight.bfloat16())
    assert base.version != version


@pytest.mark.parametrize("kind", BASE_KINDS)
def test_down_and_up_are_the_product_of_factors(kind: str) -> None:
    base, x = base_of(kind)
    A = torch.randn(*base.lead, 3, base.d_in, dtype=torch.float64)
    B = torch.randn(*base.lead, base.d_out, 3, dtype=torch.float64)
    h = base.down(x, A)
    assert h.shape[-1] == 3
    y = base(x)
    torch.testing.assert_close(base.up(h, B, onto=y, scale=0.7) - y, dense(base, x, 0.7 * B @ A, None))


@pytest.mark.parametrize("kind", BASE_KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rank_weights_serve_every_kind(kind: str, dtype: torch.dtype) -> None:
    base, x = base_of(kind, dtype)
    A, B = torch.randn(*base.lead, 3, base.d_in), torch.randn(*base.lead, base.d_out, 3)
    w = torch.randn(3)
    y = add_low_rank(base, x, A, B, w)
    assert y.dtype == dtype
    if dtype == torch.float64:
        A, B, w = A.double(), B.double(), w.double()
        torch.testing.assert_close(
            y, dense(base, x, base.weight() + B @ (w[:, None] * A), base.bias), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", [kind for kind in BASE_KINDS if kind != "Embedding"])
def test_per_output_broadcasts_over_outputs(kind: str) -> None:
    base, x = base_of(kind)
    delta = torch.randn(*base.lead, base.d_out, dtype=torch.float64)
    bias = delta if base.bias is None else base.bias + delta
    torch.testing.assert_close(base(x) + base.per_output(delta), dense(base, x, base.weight(), bias))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
        nn.Conv1d(4, 4, 3, groups=4),
    ],
    ids=["circular", "reflect", "depthwise"],
)
@pytest.mark.parametrize("batched", [True, False])
def test_convolutions_keep_padding_and_groups(module: nn.Module, batched: bool) -> None:
    module = module.double()
    base = core_base_layer(module)
    assert base is not None
    adapter = LowRankAdapter(base, rank=2, scaling=0.5)
    perturb(adapter)
    x = torch.randn(4, 7, 6, dtype=torch.float64) if isinstance(module, nn.Conv2d) else torch.randn(4, 7).double()
    x = x.expand(2, *x.shape) if batched else x
    expected = base.apply(x, adapter.merged_weight(base.weight()), base.bias)
    torch.testing.assert_close(adapter(x, base), expected)


class OwnForward(nn.Linear):
    """Another way to write the same layer, as Falcon does."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Quadratic(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) ** 2


class TwoInputs(nn.Linear):
    def forward(self, input: Tensor, gate: Tensor) -> Tensor:
        return F.linear(input, self.weight) * gate


class Normed(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(super().forward(input), dim=-1)


class ConvPlusOne(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Packed(nn.Linear):
    """Like a 4-bit layer: a weight that holds no floating-point numbers."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    "module",
    [
        Quadratic(4, 4),
        TwoInputs(4, 4),
        Packed(),
        ConvPlusOne(2, 2, 1),
        Normed(5, 4),
        nn.Embedding(5, 4, max_norm=1.0),
        nn.Embedding(5, 4, sparse=True),
        OPTLearnedPositionalEmbedding(5, 4),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.ConvTranspose1d(2, 2, 1),
        nn.LayerNorm(4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_layers_whose_update_would_be_wrong_are_not_served(module: nn.Module) -> None:
    assert core_base_layer(module) is None


def test_subclasses_that_compute_the_same_are_served() -> None:
    linear, scaled = OwnForward(6, 5), Gemma3TextScaledWordEmbedding(11, 5, padding_idx=0, embed_scale=5**0.5)
    for module, x in ((linear, torch.randn(3, 6)), (scaled, torch.arange(11))):
        base = core_base_layer(module)
        assert base is not None
        adapter = LowRankAdapter(base, rank=2, scaling=1.0)
        perturb(adapter)
        expected = base.apply(x, adapter.merged_weight(base.weight()), base.bias)
        torch.testing.assert_close(adapter(x, base), expected)


def test_dense_is_false_where_a_hook_would_be_skipped() -> None:
    for kind in ("Linear", "Conv1D"):
        base, _ = base_of(kind)
        assert base.dense
        handle = base.module.register_forward_hook(lambda *_: None)
        assert not base.dense
        handle.remove()
        assert base.dense
        base.module.forward = lambda x: x  # type: ignore[method-assign]
        assert not base.dense
    assert not base_of("Conv2d")[0].dense


def test_hooks_of_an_embedding_see_the_whole_vector_only() -> None:
    base, x = base_of("Embedding")
    seen: list[tuple[int, ...]] = []
    base.module.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    adapter = LowRankAdapter(base, rank=2, scaling=1.0)
    adapter(x, base)
    assert seen == [(2, 4, 5)]


def test_conv1d_without_bias_term() -> None:
    base = core_base_layer(Conv1D(5, 6))
    assert base is not None
    x = torch.randn(2, 6)
    torch.testing.assert_close(base.apply(x, base.weight()), x @ base.weight().T)


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"stride": (2, 1, 1), "padding": 1, "dilation": (1, 2, 1)}])
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "RoseLoRA"])
def test_a_convolution_over_volumes(name: str, options: dict[str, Any]) -> None:
    """The reference is the plain layer with the merged kernels, which each method states for itself."""
    with seeded(0):
        model = nn.Sequential(nn.Conv3d(2, 4, (2, 3, 2), **options).double())
    x = torch.randn(2, 2, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    base = model(x)
    ll.inject(model, ll.method(name)(rank=2), targets=["0"], seed=0)
    torch.testing.assert_close(model(x), base)
    layer = model[0]
    perturb(layer.adapters, 3)
    adapted = model(x)
    assert not torch.allclose(adapted, base)
    merged = layer.merged_weight("default", torch.float64).reshape(layer.base.weight.shape)
    plain = copy.deepcopy(layer.base)
    plain.weight.data.copy_(merged)
    torch.testing.assert_close(plain(x), adapted)
    adapted.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.adapters.parameters() if p.requires_grad)
    ll.merge(model)
    torch.testing.assert_close(model(x), adapted)
    ll.unmerge(model)
    ll.eject(model)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_grouped_convolution_keeps_its_dtype_under_autocast(rank):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    ll.inject(model, LoRA(rank=rank), ["0"], also_train=())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        x = torch.ones(2, 4, 5, 5)
        assert model(x).dtype == model[0].base(x).dtype == torch.bfloat16
