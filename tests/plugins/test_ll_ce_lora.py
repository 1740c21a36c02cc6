"""CE-LoRA: the contract, dense references of its backward pass, when channels are chosen, and what a step can save.

Numbers in test names are those of the method's invariants: 1 to 13.
"""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback
from projects import loader
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy_runs import classification, encoder_folder, labelled_data, trainer

from ll_ce_lora import CELoRA
from ll_ce_lora.adapter import CELoRAAdapter
from ll_ce_lora.callback import RefreshIndex, bases
from ll_ce_lora.cost import Layer, as_lora, flops, split_elements, without_base_gradient
from ll_ce_lora.functional import (
    channel_count,
    cheap_linear,
    draw_channels,
    grad_input,
    row_norms,
    split,
    top_channels,
)
from ll_lora import LoRA
from ll_lorasc import LoRASC
from lora_lightning.callbacks import InjectAdapters
from lora_lightning.errors import AdapterStateError, NoEffectError, ResumeError, SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge_model import eject, merge, unmerge
from lora_lightning.injection.records import adapters_named, iter_adapters, trainable_adapters
from lora_lightning.injection.switches import set_active
from lora_lightning.storage.folder import save_adapter
from lora_lightning.testing import MethodContract, perturb, tiny_encoder
from lora_lightning.testing.toy_models import LAYERS, QUANTIZED, seeded
from lora_lightning.training.trainer_checkpoints import AtomicCheckpoints

LINEAR = ("Linear", "Linear without bias", "Conv1D")
D_IN, D_OUT, N = 7, 10, 12


class TestCELoRA(MethodContract):
    method = CELoRA(rank=2, alpha=4.0, kept=0.5, svd_rank=1)
    base_kinds = (*LINEAR, "Experts", "Experts transposed")


# -- the product, against a dense reference ----------------------------------------------------------------------------


def case(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """G (N, d_out) and W (d_out, d_in), with columns and rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    size = lambda n: torch.rand(n, generator=generator, dtype=torch.float64) * 3 + 0.1  # noqa: E731
    G = torch.randn(N, D_OUT, generator=generator, dtype=torch.float64) * size(D_OUT)
    W = torch.randn(D_OUT, D_IN, generator=generator, dtype=torch.float64) * size(D_OUT)[:, None]
    return G.to(dtype), W.to(dtype)


def reference_split(W: torch.Tensor, r0: int) -> torch.Tensor:
    """B0 A0, the truncated singular value decomposition."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :r0] * S[:r0]) @ Vh[:r0]


def reference_scores(G: torch.Tensor, W: torch.Tensor, r0: int) -> torch.Tensor:
    rest = W - reference_split(W, r0)
    return torch.stack([G[:, j].norm() * rest[j].norm() for j in range(len(W))])


def reference_dx(G: torch.Tensor, W: torch.Tensor, S: list[int], r0: int) -> torch.Tensor:
    """The paper's form: the low-rank part for all channels, rows of the residual for those in S, one by one."""
    low = reference_split(W, r0)
    total = G @ low
    for j in S:
        total = total + torch.outer(G[:, j], (W - low)[j])
    return total


def factors(W: torch.Tensor, r0: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return split(W, r0) if r0 else (None, None)


def ours(G: torch.Tensor, W: torch.Tensor, K: int, r0: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(dX, S) by the functions under test."""
    B0, A0 = factors(W, r0)
    scores = torch.linalg.vector_norm(G, dim=0) * row_norms(W, B0, A0)
    index = top_channels(scores, K)
    return grad_input(G, W, index, None, B0, A0), index


@pytest.mark.parametrize("r0", [0, 1, 3, 6])
@pytest.mark.parametrize("K", [0, 1, 4, 9, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_04_gradient_equals_the_dense_reference_with_and_without_split(r0, K, seed):
    G, W = case(seed)
    scores = reference_scores(G, W, r0).tolist()
    expected_S = sorted(sorted(range(D_OUT), key=lambda j: (-scores[j], j))[:K])
    dx, S = ours(G, W, K, r0)
    assert S.tolist() == expected_S
    torch.testing.assert_close(dx, reference_dx(G, W, expected_S, r0), atol=1e-11, rtol=0)
    if r0 == 0:
        torch.testing.assert_close(dx, G[:, expected_S] @ W[expected_S], atol=1e-12, rtol=0)
    if K == 0:
        torch.testing.assert_close(dx, G @ reference_split(W, r0), atol=1e-11, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("r0", [0, 2, 7])
def test_01_keeping_all_channels_is_exact(dtype, tolerance, r0):
    G, W = case(dtype=dtype)
    dx, S = ours(G, W, D_OUT, r0)
    assert S.tolist() == list(range(D_OUT))
    exact = G.double() @ W.double()
    assert float((dx - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("K", [0, 1, 5, 10])
@pytest.mark.parametrize("wide", [False, True])
def test_02_a_split_of_full_rank_is_exact_for_every_count(dtype, tolerance, K, wide):
    G, W = case(dtype=dtype)
    if wide:
        G, W = G[:, :D_IN], W.T.contiguous()
    dx, _ = ours(G, W, min(K, len(W)), D_IN)
    exact = G.double() @ W.double()
    assert float((dx - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("r0", [1, 3, 6])
def test_03_split_is_the_truncated_decomposition(wide, r0):
    W = case()[1].T.contiguous() if wide else case()[1]
    B0, A0 = split(W, r0)
    assert (B0.shape, A0.shape) == ((len(W), r0), (r0, W.shape[1]))
    sigma = torch.linalg.svdvals(W)
    residual = W - B0 @ A0
    torch.testing.assert_close(B0 @ A0, reference_split(W, r0), atol=1e-12, rtol=0)
    assert float(torch.linalg.matrix_norm(residual, 2)) == pytest.approx(float(sigma[r0]), abs=1e-11)
    assert float(residual.square().sum()) == pytest.approx(float(sigma[r0:].square().sum()), abs=1e-11)
    torch.testing.assert_close(row_norms(W, B0, A0), residual.norm(dim=1), atol=1e-12, rtol=0)


def test_split_of_a_weight_of_less_rank_than_asked():
    W = torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 5.0))
    B0, A0 = split(W, 3)
    torch.testing.assert_close(B0 @ A0, W)
    torch.testing.assert_close(row_norms(W, B0, A0), torch.zeros(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("r0", [0, 2])
@pytest.mark.parametrize("seed", range(5))
def test_07_error_is_at_most_the_sum_of_the_dropped_scores(r0, seed):
    G, W = case(seed)
    scores = reference_scores(G, W, r0)
    bounds = []
    for K in range(D_OUT + 1):
        dx, S = ours(G, W, K, r0)
        dropped = [j for j in range(D_OUT) if j not in S.tolist()]
        bounds.append(float(scores[dropped].sum()))
        assert float((dx - G @ W).norm()) <= bounds[-1] + 1e-9
    assert all(later <= earlier for earlier, later in itertools.pairwise(bounds))


@pytest.mark.parametrize("r0", [0, 2])
def test_08_permuting_channels_permutes_the_choice_and_scaling_leaves_it(r0):
    G, W = case()
    dx, S = ours(G, W, 4, r0)
    order = torch.randperm(D_OUT, generator=torch.Generator().manual_seed(1))
    dx_permuted, S_permuted = ours(G[:, order], W[order], 4, r0)
    assert sorted(order[S_permuted].tolist()) == S.tolist()
    torch.testing.assert_close(dx_permuted, dx, atol=1e-11, rtol=0)
    for c in (1e-6, 0.3, 1024.0):
        assert torch.equal(ours(c * G, W, 4, r0)[1], S)


def test_09_choice_follows_the_gradients_mass():
    """Fails where one norm stands for the whole gradient: the choice would then depend on W alone."""
    _, W = case()
    G = torch.full((N, D_OUT), 1e-3, dtype=torch.float64)
    for heavy in ([0, 3, 5], [1, 2, 9]):
        moved = G.clone()
        moved[:, heavy] = 100.0
        assert ours(moved, W, 3, 1)[1].tolist() == heavy


@pytest.mark.parametrize("r0", [0, 2])
def test_10_drawing_is_right_on_average(r0):
    G, W = case()
    B0, A0 = factors(W, r0)
    scores = reference_scores(G, W, r0)
    p = scores / scores.sum()
    exact, total = G @ W, torch.zeros(N, D_IN, dtype=torch.float64)
    for j in range(D_OUT):  # one draw: the expectation in closed form
        total += p[j] * grad_input(G, W, torch.tensor([j]), 1 / p[j].reshape(1), B0, A0)
    torch.testing.assert_close(total, exact, atol=1e-10, rtol=0)
    generator, errors = torch.Generator().manual_seed(0), {}
    for draws in (20, 2000):
        mean = sum(grad_input(G, W, *draw_channels(scores, 4, generator), B0, A0) for _ in range(draws)) / draws
        errors[draws] = float((mean - exact).norm() / exact.norm())
    assert errors[2000] < 0.05
    assert errors[2000] < errors[20]


def test_drawn_channels_come_with_the_reciprocal_of_their_chance():
    scores = torch.tensor([1.0, 0.0, 3.0, 4.0])
    index, share = draw_channels(scores, 6, torch.Generator().manual_seed(0))
    assert index.tolist() == sorted(index.tolist())
    assert 1 not in index
    torch.testing.assert_close(share, 1 / (6 * scores[index] / 8))
    index, share = draw_channels(torch.zeros(4), 2, torch.Generator().manual_seed(0))
    assert share.tolist() == [2.0, 2.0]
    assert draw_channels(scores, 0, torch.Generator())[0].tolist() == []


@pytest.mark.parametrize(
    ("kept", "d_out", "K"),
    [(0.55, 100, 55), (0.55, 1024, 564), (0.65, 10, 7), (0.07, 100, 7), (0.0, 8, 0), (1.0, 8, 8)],
)
def test_12_count_is_the_ceiling_and_the_set_is_unique_and_sorted(kept, d_out, K):
    """100 * 0.55 and 100 * 0.07 lie just above whole numbers in floating point."""
    assert channel_count(kept, d_out) == K
    index = top_channels(torch.rand(d_out, generator=torch.Generator().manual_seed(0)), K).tolist()
    assert index == sorted(set(index))
    assert len(index) == K


def test_ties_go_to_the_lowest_index():
    assert top_channels(torch.zeros(6), 3).tolist() == [0, 1, 2]
    assert top_channels(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]


# -- the autograd node -------------------------------------------------------------------------------------------------


def test_13_gradcheck_fails_where_channels_are_left_out_and_passes_where_none_is():
    _, W = case()
    x = torch.randn(3, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bias = torch.zeros(D_OUT, dtype=torch.float64, requires_grad=True)
    B0, A0 = split(W, 2)
    whole = torch.arange(D_OUT)
    assert torch.autograd.gradcheck(lambda x, b: cheap_linear(x, W, b, None), (x, bias))
    assert torch.autograd.gradcheck(lambda x, b: cheap_linear(x, W, b, whole, None, B0, A0), (x, bias))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x: cheap_linear(x, W, None, whole[:6], None, B0, A0), (x,))


def test_backward_keeps_no_input_and_counts_each_backward_once():
    """Two forwards before one backward, as losses over pairs have them, add both norms."""
    G, W = case()
    x = torch.randn(N, D_IN, dtype=torch.float64, requires_grad=True)
    norms = torch.zeros(D_OUT, dtype=torch.float64)
    first, second = (cheap_linear(x, W, None, torch.arange(3), norms=norms) for _ in range(2))
    assert not any(saved is not None and saved.shape == x.shape for saved in first.grad_fn.saved_tensors)
    torch.autograd.backward([first, second], [G, 2 * G])
    torch.testing.assert_close(norms, 5 * G.square().sum(0))


def test_backward_inside_autocast_of_a_forward_outside_it_is_in_full_precision():
    G, W = case(dtype=torch.float32)
    x = torch.randn(N, D_IN, requires_grad=True)
    y = cheap_linear(x, W, None, torch.arange(6))
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(G)
    torch.testing.assert_close(x.grad, G[:, :6] @ W[:6])


@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
def test_half_precision_gradients_are_the_reference_up_to_rounding(mode):
    G, W = case(dtype=torch.float32)
    dtype = torch.bfloat16
    x = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(0))
    W, x = (W, x) if mode == "autocast" else (W.to(dtype), x.to(dtype))
    x.requires_grad_()
    B0, A0 = split(W, 2)
    index, norms = torch.tensor([0, 2, 5, 7]), torch.zeros(D_OUT)
    with torch.autocast("cpu", dtype, enabled=mode == "autocast"):
        y = cheap_linear(x, W, None, index, None, B0, A0, norms)
        assert torch.equal(y, nn.functional.linear(x, W))
        y.backward(G.to(y.dtype))  # inside the block, where products would autocast
    assert y.dtype == dtype
    assert x.grad.dtype == x.dtype
    expected = reference_dx(G.to(dtype).double(), W.double(), index.tolist(), 2)
    assert float((x.grad.double() - expected).norm() / expected.norm()) < 0.02
    torch.testing.assert_close(norms, G.to(dtype).float().square().sum(0))


# -- adapters ----------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """a, b, c with tanh between; a's input needs no gradient."""

    def __init__(self, mode: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 5)
        self.mode = mode

    def _tail(self, h):
        return self.c(torch.tanh(self.b(h)))

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.mode == "plain":
            return self._tail(h)
        return checkpoint(self._tail, h, use_reentrant=self.mode == "reentrant")


class Loop:
    """Training by hand at the callback's moments."""

    def __init__(self, mode="plain", lr=0.01, targets=("a", "b", "c"), overrides=None, **settings):
        self.method = CELoRA(**{"rank": 2, "alpha": 4.0, "kept": 0.5, "svd_rank": 1, "every_n_steps": 3, **settings})
        self.model = Deep(mode).double().train()
        inject(self.model, self.method, list(targets), overrides=overrides, also_train=(), seed=0)
        for i, adapter in enumerate(adapters_named(self.model, "default").values()):
            perturb(adapter, i)
        self.adapters = {path: a for path, a in trainable_adapters(self.model).items() if a.channels < a.d_out}
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        (self.schedule,) = self.method.callbacks()
        self.schedule.on_start(None, self.adapters)
        self.t = 0

    def step(self, parts: int = 1, act: bool = True) -> None:
        self.t += 1
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.t), dtype=torch.float64)
        self.optimizer.zero_grad()
        self.schedule.open_window(self.t, self.adapters, bases(self.model))
        for part in x.chunk(parts):
            (self.model(part).square().sum() / 8).backward()
        self.optimizer.step()
        if act:
            with torch.no_grad():
                self.schedule.on_stepped(self.t, self.adapters)

    def index(self, layer: str) -> list[int] | None:
        index = self.adapters[f"{layer}.adapters.default"].index
        return None if index is None else index.tolist()

    def gradients(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.model.zero_grad()
        self.model(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def batch(n: int = 5) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize(("kept", "svd_rank"), [(0.0, 1), (0.3, 0), (0.6, 2), (1.0, 3)])
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "autocast"])
def test_05_forward_is_plain_lora_bit_for_bit(kind, kept, svd_rank, precision):
    make_layer, make_input = LAYERS[kind]
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    outputs = []
    for method in (LoRA(rank=2, dropout=0.2), CELoRA(rank=2, dropout=0.2, kept=kept, svd_rank=svd_rank)):
        torch.manual_seed(0)
        model, x = nn.Sequential(make_layer()).to(dtype).train(), make_input().to(dtype).requires_grad_()
        inject(model, method, ["0"], also_train=(), seed=0)
        adapter = model[0].adapter("default")
        perturb(adapter)
        if isinstance(adapter, CELoRAAdapter) and adapter.approximates:
            adapter.split(model[0].base_layer.weight())
            adapter.refresh(torch.rand(5), 1)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            outputs.append(model(x))
        outputs[-1].float().sum().backward()
        assert x.grad.shape == x.shape
    assert torch.equal(outputs[0], outputs[1])


def test_06_adapter_gradients_of_the_last_layer_are_exact_and_those_below_are_not():
    loop, exact = Loop(), Loop(kept=1.0)
    loop.step()
    assert loop.index("c") is not None
    exact.model.load_state_dict(loop.model.state_dict())
    x = batch()
    cheap, right = loop.gradients(x), exact.gradients(x)
    for name, value in right.items():
        assert torch.equal(cheap[name], value) == name.startswith("c."), name
    loop.adapters["c.adapters.default"].index = torch.arange(5)
    loop.adapters["b.adapters.default"].index = torch.arange(8)
    for name, value in loop.gradients(x).items():
        torch.testing.assert_close(value, right[name], atol=1e-12, rtol=1e-12)


def test_gradients_of_a_network_equal_a_dense_reference():
    """The chain rule written out, with the reference's product in place of the frozen layers'."""
    loop = Loop(kept=0.5, svd_rank=1)
    loop.step()
    x, s = batch(), 2.0
    found = loop.gradients(x)
    layers = dict(iter_adapters(loop.model))
    W = {name: layers[name].base.weight.detach() for name in "abc"}
    bias = {name: layers[name].base.bias.detach() for name in "abc"}
    A = {name: layers[name].adapter("default").lora_A.detach() for name in "abc"}
    B = {name: layers[name].adapter("default").lora_B.detach() for name in "abc"}
    inputs, z = {"a": x}, {}
    for name, after in (("a", "b"), ("b", "c"), ("c", None)):
        z[name] = inputs[name] @ (W[name] + s * B[name] @ A[name]).T + bias[name]
        if after:
            inputs[after] = z[name].tanh()
    G = 2 * z["c"]
    for name, below in (("c", "b"), ("b", "a"), ("a", None)):
        key = f"{name}.adapters.default.lora_"
        torch.testing.assert_close(found[f"{key}A"], s * B[name].T @ G.T @ inputs[name], atol=1e-9, rtol=1e-10)
        torch.testing.assert_close(found[f"{key}B"], s * G.T @ inputs[name] @ A[name].T, atol=1e-9, rtol=1e-10)
        if below:
            dx = reference_dx(G, W[name], loop.index(name), 1) + s * G @ B[name] @ A[name]
            G = dx * (1 - inputs[name].square())


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("parts", [1, 2])
def test_11_recomputed_activations_change_nothing(mode, parts):
    plain, recomputed = Loop(dropout=0.2), Loop(mode, dropout=0.2)
    for loop in (plain, recomputed):
        torch.manual_seed(4)
        for _ in range(7):
            loop.step(parts)
        assert loop.schedule.refreshes == 1 + (7 - 1) // 3
    assert plain.index("b") == recomputed.index("b")
    own, other = plain.model.state_dict(), recomputed.model.state_dict()
    assert all(torch.equal(own[key], other[key]) for key in own)


def test_11_micro_batches_share_one_choice_and_add_up_to_the_whole_batch():
    whole, parts = Loop(), Loop()
    for _ in range(7):
        whole.step()
        parts.step(4)
        assert whole.index("b") == parts.index("b")
        assert whole.index("c") == parts.index("c")
    torch.testing.assert_close(
        whole.adapters["b.adapters.default"].lora_B, parts.adapters["b.adapters.default"].lora_B, atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("period", [1, 2, 5])
def test_11_choices_after_n_steps(period):
    loop = Loop(every_n_steps=period)
    for n in range(1, 12):
        before = loop.index("b")
        loop.step()
        assert loop.schedule.refreshes == 1 + (n - 1) // period
        if (n - 1) % period:
            assert loop.index("b") == before


def test_first_step_is_exact_and_the_choice_is_that_of_its_gradient():
    loop, plain = Loop(), Loop(kept=1.0)
    loop.step()
    plain.t = 1
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = {}
    for name in "bc":
        plain.model.get_submodule(name).register_forward_hook(
            lambda _, __, y, name=name: (y.retain_grad(), outputs.update({name: y}))[0]
        )
    plain.gradients(x)
    for name in "bc":
        W = plain.model.get_submodule(name).base.weight.detach()
        scores = reference_scores(outputs[name].grad, W, 1)
        K = math.ceil(len(W) / 2)
        assert loop.index(name) == sorted(scores.argsort(descending=True)[:K].tolist())
    assert loop.index("a") is None  # its input needs no gradient, so nothing was observed


def test_eval_mode_a_hook_and_a_trained_weight_are_exact():
    loop, exact = Loop(), Loop(kept=1.0)
    loop.step()
    exact.model.load_state_dict(loop.model.state_dict())
    x = batch()

    def same() -> bool:
        cheap, right = loop.gradients(x), exact.gradients(x)
        return all(torch.equal(cheap[name], right[name]) for name in right)

    assert not same()
    loop.model.eval()
    assert same()
    loop.model.train()
    hooks = [loop.model.get_submodule(name).base.register_forward_hook(lambda *_: None) for name in "bc"]
    assert same()
    for hook in hooks:
        hook.remove()
    for name in "bc":
        loop.model.get_submodule(name).base.weight.requires_grad_(True)
    assert same()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_base_is_called_as_it_is_and_approximated_by_its_dequantized_weight(kind):
    package, quantize = QUANTIZED[kind]
    pytest.importorskip(package, reason=f'needs {package}: pip install "lora-lightning[quant]"')
    with seeded(1):
        model = nn.Sequential(quantize(nn.Linear(D_IN + 1, D_OUT + 6))).train()
        x, G = torch.randn(2, 5, D_IN + 1, requires_grad=True), torch.randn(2, 5, D_OUT + 6)
    inject(model, CELoRA(rank=2, kept=0.5, svd_rank=2), ["0"], also_train=(), seed=0)
    layer = model[0]
    adapter, W = layer.adapter("default"), layer.base_layer.weight(torch.float64)
    rows = G.reshape(-1, D_OUT + 6).double()

    def gradient() -> torch.Tensor:
        y = layer(x)
        assert torch.equal(y, layer.base(x))
        x.grad = None
        y.backward(G)
        return x.grad.reshape(-1, D_IN + 1).double()

    adapter.observe(True)
    torch.testing.assert_close(gradient(), rows @ W, rtol=0, atol=1e-4)
    torch.testing.assert_close(adapter.norms.double(), rows.square().sum(0), rtol=1e-5, atol=0)
    squares = adapter.norms
    adapter.observe(False)
    adapter.split(layer.base_layer.weight())
    adapter.refresh(squares, 1)
    cheap, expected = gradient(), reference_dx(rows, W, adapter.index.tolist(), 2)
    torch.testing.assert_close(cheap, expected, rtol=0, atol=1e-4)
    assert float((cheap - rows @ W).abs().max()) > 0.1
    handle = layer.base.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(gradient(), rows @ W, rtol=0, atol=2e-2 if kind == "int8" else 1e-4)
    handle.remove()


@pytest.mark.parametrize("names", [("one", "two"), ("two", "one"), ("plain", "one"), ("one", "plain")])
def test_stacked_adapters_approximate_the_one_base_call_only(names):
    """The frozen product's gradient is the reference's with the last one's channels; all updates' shares are exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8)).double().train()
    methods = {name: CELoRA(rank=2, kept=0.5, svd_rank=1) for name in ("one", "two")} | {"plain": LoRA(rank=2)}
    W, G = model[0].weight.detach(), torch.randn(3, 8, dtype=torch.float64)
    for seed, name in enumerate(names):
        inject(model, methods[name], ["0"], also_train=(), name=name, seed=1)
        perturb(model[0].adapter(name), seed)
    own = [adapter for name in names if isinstance(adapter := model[0].adapter(name), CELoRAAdapter)]
    for seed, adapter in enumerate(own):
        adapter.split(W)
        adapter.refresh(torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 1)
        adapter.observe(True)
    assert len({tuple(adapter.index.tolist()) for adapter in own}) == len(own)
    set_active(model, names)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    model(x).backward(G)
    updates = sum(B @ A for A, B in (model[0].adapter(name).low_rank() for name in names))
    expected = reference_dx(G, W, own[-1].index.tolist(), 1) + G @ updates
    torch.testing.assert_close(x.grad, expected, atol=1e-12, rtol=0)
    for adapter in own[:-1]:
        assert not adapter.norms.any()
    torch.testing.assert_close(own[-1].norms, G.square().sum(0))


def test_base_is_never_written_and_comes_back_bit_for_bit():
    loop, x = Loop(), batch()
    plain = Deep().double()
    for _ in range(5):
        loop.step()
    adapted = loop.model(x)
    merge(loop.model)
    torch.testing.assert_close(loop.model(x), adapted)
    unmerge(loop.model)
    assert torch.equal(loop.model(x), adapted)
    assert loop.index("b") is not None
    eject(loop.model)
    own, other = loop.model.state_dict(), plain.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)


def test_adapter_file_and_state_hold_the_two_factors_only(tmp_path):
    model = tiny_encoder().train()
    inject(model, CELoRA(rank=2, kept=0.5, svd_rank=1), seed=0)
    for layer in (layer for _, layer in iter_adapters(model)):
        adapter = layer.adapter("default")
        adapter.split(layer.base_layer.weight())
        adapter.refresh(torch.rand(adapter.d_out), 1)
        assert set(adapter.state_dict()) == {"lora_A", "lora_B"}
    folder = save_adapter(model, tmp_path / "adapter")
    ours = [key for key in load_file(Path(folder) / "adapter.safetensors") if ".adapters." in key]
    assert {key.rsplit(".", 1)[1] for key in ours} == {"lora_A", "lora_B"}
    assert len(ours) == 2 * len(list(iter_adapters(model)))


def test_a_copy_keeps_the_choice_and_shares_nothing():
    loop = Loop()
    loop.step()
    twin = copy.deepcopy(loop.model)
    adapter = twin.get_submodule("b").adapter("default")
    assert torch.equal(adapter.index, loop.adapters["b.adapters.default"].index)
    adapter.index.zero_()
    assert loop.index("b") != adapter.index.tolist()


def test_a_rewritten_base_weight_is_split_again():
    loop = Loop(every_n_steps=100)
    loop.step()
    adapter, layer = loop.adapters["b.adapters.default"], loop.model.get_submodule("b")
    before = adapter.B0 @ adapter.A0
    loop.step()
    assert torch.equal(adapter.B0 @ adapter.A0, before)
    with torch.no_grad():
        layer.base.weight.add_(torch.randn(8, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    loop.step()
    W = layer.base.weight.detach()
    torch.testing.assert_close(adapter.B0 @ adapter.A0, reference_split(W, 1), atol=1e-12, rtol=0)
    torch.testing.assert_close(adapter.row_norms, (W - reference_split(W, 1)).norm(dim=1), atol=1e-12, rtol=0)
    assert loop.schedule.refreshes == 1


def test_an_adapter_that_was_started_again_chooses_after_its_next_step():
    loop, resumed = Loop(every_n_steps=100), Loop(every_n_steps=100)
    for _ in range(3):
        loop.step()
    before = loop.index("c")
    loop.adapters["b.adapters.default"].reset(torch.Generator().manual_seed(1))
    loop.schedule._adapters, loop.schedule.last_step = loop.adapters, 3
    state = loop.schedule.state_dict()  # saved where it has no channels, as at the end of a stage
    resumed.model.load_state_dict(loop.model.state_dict())
    resumed.schedule.load_state_dict(state)
    resumed.schedule.on_start(None, resumed.adapters)
    resumed.t = 3
    for each in (loop, resumed):
        each.step()
        assert each.index("b") is not None
        assert each.index("c") == before
        assert each.schedule.refreshes == 2
        each.step()
        assert each.schedule.refreshes == 2
    assert loop.index("b") == resumed.index("b")


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_each_stage_of_a_cascade_approximates_from_its_second_step(tmp_path, noise):
    """The weight is another one after a stage end, and so are the channels."""
    chosen = []

    class Chosen(Callback):
        phase = 2

        def on_train_batch_end(self, trainer, pl_module, *_):
            if schedule.refreshes > len(chosen):
                chosen.append(trainer.global_step)

    inner = CELoRA(rank=2, kept=0.5, svd_rank=1, every_n_steps=50)
    method, schedule = LoRASC(inner=inner, noise=noise, stage_steps=4), RefreshIndex()
    callbacks = [InjectAdapters(method, ["a", "b", "c"], seed=0), schedule, Chosen()]
    trainer(tmp_path, callbacks, max_steps=11).fit(Project(), loader(32))
    assert chosen == [1, 5, 9]


def test_norms_that_are_not_finite_postpone_the_choice():
    loop = Loop()
    loop.step(act=False)
    loop.adapters["b.adapters.default"].norms[2] = float("inf")
    loop.schedule.on_stepped(1, loop.adapters)
    assert loop.index("b") is None
    assert loop.index("c") is not None
    loop.step()
    assert loop.index("b") is not None


def test_a_skipped_optimizer_step_is_forgotten_and_made_up_for():
    loop, straight = Loop(lr=0.0), Loop(lr=0.0)
    loop.step(act=False)
    loop.step()
    straight.t = 1
    straight.step()
    assert loop.index("b") == straight.index("b")
    assert loop.schedule.refreshes == 1
    loop.step()
    assert loop.schedule.refreshes == 1
    loop.step()  # the fourth: postponing one choice does not move the others
    assert loop.schedule.refreshes == 2


def test_shares_and_periods_by_layer():
    loop = Loop(overrides={"b": {"kept": 0.25, "every_n_steps": 1}, "c": {"kept": 1.0}}, every_n_steps=100)
    adapters = adapters_named(loop.model, "default")
    assert {path: a.channels for path, a in adapters.items()} == {"a": 3, "b": 2, "c": 5}
    for _ in range(3):
        loop.step()
    assert len(loop.index("b")) == 2
    assert adapters["c"].index is None
    assert loop.schedule.refreshes == 3


def test_drawn_channels_are_a_function_of_seed_layer_and_step():
    loops = [Loop(selection="sample", every_n_steps=1, lr=0.0) for _ in range(2)]
    seen = []
    for loop in loops:
        for _ in range(6):
            torch.rand(3)
            loop.t = 0
            loop.schedule._last = {}
            loop.step()
            seen.append(loop.index("b"))
    assert seen[:6] == seen[6:]
    drawn = loops[0].adapters["b.adapters.default"]
    choices = set()
    for step in range(20):
        drawn.refresh(torch.ones(8, dtype=torch.float64), step)
        choices.add(tuple(drawn.index.tolist()))
    assert len(choices) > 10
    assert drawn.share.shape == drawn.index.shape == (4,)


# Dynamo itself instantiates autograd.Function when it traces one, which torch warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_backward_observes_and_approximates_alike():
    loop = Loop()
    loop.step()
    adapter, x = loop.adapters["b.adapters.default"], batch()
    torch._dynamo.reset()
    compiled = torch.compile(loop.model, fullgraph=True, backend="aot_eager")
    norms, gradients = [], []
    for model in (loop.model, compiled):
        adapter.observe(True)
        loop.model.zero_grad()
        model(x).square().sum().backward()
        norms.append(adapter.norms)
        gradients.append([p.grad.clone() for p in loop.model.parameters() if p.grad is not None])
    torch._dynamo.reset()
    torch.testing.assert_close(*norms, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_refresh_before_split_says_so():
    adapter = Loop().adapters["b.adapters.default"]
    with pytest.raises(AdapterStateError, match="not split yet; call split"):
        adapter.refresh(torch.ones(8), 1)


# -- processes ---------------------------------------------------------------------------------------------------------


def _worker(rank: int, rendezvous: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    loop = Loop(lr=0.0, every_n_steps=1)
    loop.t = 10 * rank
    loop.step()
    torch.save(loop.schedule.state_dict() | {"adapter": loop.index("b")}, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.multi
def test_two_processes_with_other_data_choose_the_same_channels(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True)["adapter"] for rank in range(2))
    both = Loop(lr=0.0)
    both.schedule.open_window(1, both.adapters, bases(both.model))
    for t in (1, 11):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        both.model(x).square().sum().backward()
    both.schedule.on_stepped(1, both.adapters)
    assert one == two == both.index("b")


def test_norms_are_summed_over_processes_before_choosing(monkeypatch):
    loop, other = Loop(lr=0.0), torch.zeros(8, dtype=torch.float64)
    other[[1, 4, 6, 7]] = 1e6
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.add_(other) if len(t) == 8 else t)
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda t, source: sent.append((t, source)))
    loop.step()
    assert loop.index("b") == [1, 4, 6, 7]
    # what is derived from a weight comes from one process as well
    chosen = next(adapter for path, adapter in loop.adapters.items() if path.startswith("b."))
    assert any(tensor is chosen.row_norms and source == 0 for tensor, source in sent)


# -- under a trainer ---------------------------------------------------------------------------------------------------


class Project(LightningModule):
    def __init__(self, mode: str = "plain") -> None:
        super().__init__()
        self.net = Deep(mode)

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, mode="plain", targets=("a", "b", "c"), steps=7, **options):
    method = CELoRA(**{"rank": 2, "kept": 0.5, "svd_rank": 1, "every_n_steps": 3, **options.pop("settings", {})})
    module, schedule = Project(mode), RefreshIndex()
    callbacks = [InjectAdapters(method, list(targets), seed=0), schedule]
    trainer(folder, callbacks, max_steps=steps, **options).fit(module, loader(32))
    return module, schedule


@pytest.mark.parametrize(("mode", "accumulate"), [("plain", 1), ("plain", 3), ("reentrant", 2), ("non-reentrant", 2)])
def test_11_trainer_counts_optimizer_steps(tmp_path, mode, accumulate):
    module, schedule = fit(tmp_path, mode, accumulate_grad_batches=accumulate)
    assert schedule.refreshes == 1 + (7 - 1) // 3
    adapters = adapters_named(module, "default")
    assert [adapters[f"net.{name}"].index is None for name in "abc"] == [True, False, False]
    facts = next(iter(adapters.values()))
    assert facts.norms is None


def test_nothing_to_approximate_is_an_error(tmp_path):
    with pytest.raises(NoEffectError, match=r"RefreshIndex found nothing to act on: .*kept below 1"):
        fit(tmp_path, settings={"kept": 1.0})
    with pytest.raises(NoEffectError, match=r"none of the 1 layers can be approximated, such as net.a.*no gradient"):
        fit(tmp_path, targets=["a"])


class SaveOnce(Callback):
    phase = 9

    def __init__(self, path, when):
        self.path, self.when = path, when

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self.path.exists() and self.when(trainer.global_step, batch_idx):
            trainer.save_checkpoint(self.path)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"), dropout=0.1)


def train(encoder, folder, selection, callbacks=(), path=None, seed=3):
    seed_everything(seed, verbose=False)
    method = CELoRA(rank=2, kept=0.5, svd_rank=1, every_n_steps=3, selection=selection)
    module, schedule = classification(encoder, method), RefreshIndex()
    run = trainer(folder, [schedule, *callbacks], plugins=[AtomicCheckpoints()], max_steps=8, accumulate_grad_batches=2)
    run.fit(module, datamodule=labelled_data(encoder), ckpt_path=path, weights_only=True)
    return module, schedule


@pytest.mark.parametrize(
    ("selection", "when"),
    [
        ("top", lambda step, batch_idx: step == 5),  # between two choices
        ("sample", lambda step, batch_idx: step == 3 and batch_idx == 6),  # inside the window of an observed step
    ],
)
def test_resuming_equals_not_having_stopped(encoder, tmp_path, selection, when):
    path = tmp_path / "saved.ckpt"
    straight, one = train(encoder, tmp_path, selection, [SaveOnce(path, when)])
    saved = torch.load(path, weights_only=True)["callbacks"]["RefreshIndex"]
    assert any(saved["norms"]) == (selection == "sample")
    resumed, two = train(encoder, tmp_path, selection, path=path, seed=4)
    assert one.refreshes == two.refreshes == 1 + (8 - 1) // 3
    before, after = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    first, second = one.state_dict(), two.state_dict()
    assert first["derived"].keys() == second["derived"].keys()
    chosen = 0
    for layer, tensors in first["derived"].items():
        assert tensors.keys() == second["derived"][layer].keys()
        assert all(torch.equal(value, second["derived"][layer][name]) for name, value in tensors.items())
        chosen += "index" in tensors
    assert chosen == 2  # query and value of the second block; the first block's inputs need no gradient


def test_partial_norms_of_other_process_counts_are_refused():
    loop = Loop()
    loop.step(act=False)
    loop.schedule._adapters = loop.adapters
    state = loop.schedule.state_dict()
    state["norms"] = state["norms"] * 2
    other = RefreshIndex()
    other.load_state_dict(state)
    with pytest.raises(ResumeError, match=r"norms of 2 processes inside an accumulation window; this run has 1"):
        other.on_start(None, loop.adapters)


# -- what it saves -----------------------------------------------------------------------------------------------------

LLAMA_8B = {  # d_in, d_out of one block's linear layers
    "q": (4096, 4096),
    "k": (4096, 1024),
    "v": (4096, 1024),
    "o": (4096, 4096),
    "gate": (4096, 14336),
    "up": (4096, 14336),
    "down": (14336, 4096),
}
SHIPPED = {"v": 0.55, "o": 0.55, "up": 0.65, "down": 0.65}


def block(kept: dict[str, float], rank: int = 14, svd_rank: int = 14) -> list[Layer]:
    """Linear layers of one block, those in `kept` approximated at this rank; the others as LoRA of rank 16."""
    return [
        Layer(d_in, d_out, rank if name in kept else 16, channel_count(kept.get(name, 1.0), d_out), svd_rank)
        for name, (d_in, d_out) in LLAMA_8B.items()
    ]


@pytest.mark.parametrize(
    ("kept", "svd_rank", "plain", "checkpointed"),
    [
        (SHIPPED, 14, 1.13, 1.08),
        (dict.fromkeys(LLAMA_8B, 0.5), 14, 1.33, 1.20),
        (dict.fromkeys(LLAMA_8B, 0.25), 14, 1.59, 1.33),
        (dict.fromkeys(LLAMA_8B, 1 / 16), 14, 1.86, 1.45),
        (dict.fromkeys(LLAMA_8B, 0.0), 0, 1.99, 1.50),
    ],
)
def test_speedup_bounds_of_a_large_model(kept, svd_rank, plain, checkpointed):
    """Over LoRA of rank 16; counted product by product beside the function, rows of W_s rebuilt for 8192 tokens."""
    layers, lora = block(kept, svd_rank=svd_rank), block({})
    ours = theirs = 0.0
    for name, (n, m) in LLAMA_8B.items():
        theirs += 2 * n * m + 4 * 16 * (n + m)
        if name in kept:
            K = kept[name] * m
            ours += 4 * 14 * (n + m) + 2 * K * n + 2 * svd_rank * (n + m) + 2 * K * svd_rank * n / 8192
        else:
            ours += 2 * n * m + 4 * 16 * (n + m)
    forward_theirs = sum(2 * n * m + 2 * 16 * (n + m) for n, m in LLAMA_8B.values())
    forward_ours = sum(2 * n * m + 2 * (14 if name in kept else 16) * (n + m) for name, (n, m) in LLAMA_8B.items())
    for forwards, expected in ((1, plain), (2, checkpointed)):
        bound = flops(lora, forwards) / flops(layers, forwards)
        assert round(bound, 2) == expected
        by_hand = (forwards * forward_theirs + theirs) / (forwards * forward_ours + ours)
        assert bound == pytest.approx(by_hand, rel=2e-3)
        ceiling = flops(as_lora(layers), forwards) / flops(without_base_gradient(layers), forwards)
        assert flops(as_lora(layers), forwards) / flops(layers, forwards) <= ceiling < (2.0, 1.5)[forwards - 1]


def test_memory_of_the_split_of_a_large_model():
    assert round(32 * split_elements(block(SHIPPED)) * 2 / 2**20) == 43  # MiB in bfloat16


def test_report_counts_the_actual_layers():
    loop = Loop(overrides={"c": {"kept": 1.0}})
    loop.step()
    facts = loop.method.report(adapters_named(loop.model, "default"))
    lora = sum(4 * n * m + 6 * 2 * (n + m) for n, m in ((4, 6), (6, 8), (8, 5)))
    saved = sum(2 * n * m - 2 * K * n - 2 * (n + m) for n, m, K in ((4, 6, 3), (6, 8, 4)))
    assert facts["lora_flops_per_token"] == lora
    assert facts["flops_per_token"] == lora - saved
    assert facts["speedup_bound"] == lora / (lora - saved)
    limit = sum(2 * n * m for n, m in ((4, 6), (6, 8), (8, 5)))
    assert facts["speedup_limit"] == lora / (lora - limit)
    assert facts["split_elements"] == 10 + 14
    assert facts["index_elements"] == 6 + 3 + 8 + 4
    counts = ("approximated_layers", "exact_layers", "layers_with_chosen_channels")
    assert [facts[name] for name in counts] == [2, 1, 1]


@pytest.mark.parametrize("kind", ["Experts", "Experts transposed"])
def test_stacked_experts_train_as_loras_and_are_counted_as_exact(kind):
    make, inputs = LAYERS[kind]
    found, facts = [], {}
    for method in (LoRA(rank=2, alpha=4.0), CELoRA(rank=2, alpha=4.0, svd_rank=1)):
        with seeded(1):
            model, x = nn.Sequential(make()).train(), inputs().requires_grad_()
        inject(model, method, ["0"], also_train=(), seed=0)
        adapters = adapters_named(model, "default")
        perturb(adapters["0"])
        y = model(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in adapters["0"].parameters())])
        facts = method.report(adapters)
    assert len(found[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert (facts["approximated_layers"], facts["exact_layers"], facts["speedup_bound"]) == (0, 1, 1.0)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kept": 1.5}, r"CELoRA.kept is 1.5; it must lie in \[0, 1\]. Fraction of output channels"),
        ({"kept": 0.0, "svd_rank": 0}, r"CELoRA.kept is 0.0; with svd_rank=0 it must be above 0"),
        ({"svd_rank": -1}, r"CELoRA.svd_rank is -1; it must be at least 0"),
        ({"svd_rank": 1.5}, r"CELoRA.svd_rank is 1.5; it must be a whole number"),
        ({"every_n_steps": 0}, r"CELoRA.every_n_steps is 0; it must be at least 1"),
        ({"selection": "tops"}, r'CELoRA.selection is "tops". Did you mean "top"\? It takes: "top", "sample"'),
        ({"rank": 0}, r"CELoRA.rank is 0; it must be at least 1"),
        ({"dropout": 1.0}, r"CELoRA.dropout is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        CELoRA(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("Conv2d", {}, r"CELoRA on 0: the layer is a convolution; only linear layers .* Exclude it"),
        ("Embedding", {}, r"CELoRA on 0: the layer is an embedding; only linear layers"),
    ],
)
def test_layers_that_cannot_have_it(kind, settings, message):
    model = nn.Sequential(LAYERS[kind][0]())
    with pytest.raises(SettingsError, match=message):
        inject(model, CELoRA(**{"rank": 2, "svd_rank": 1, **settings}), ["0"], also_train=(), seed=0)


def test_scaling_rules():
    assert CELoRA(rank=16, alpha=32.0).scaling == 2.0
    assert CELoRA(rank=16, alpha=32.0, scaling_rule="alpha/sqrt(r)").scaling == 8.0
