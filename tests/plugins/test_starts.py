"""The starts that plugins bring (PiSSA, OLoRA, EVA, LoRA-GA, CorDA, LoftQ), on every method made of one pair."""

from __future__ import annotations

import copy
import importlib
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft_models import PEFT_WARNINGS
from torch import Tensor, nn

import lora_lightning as ll
from ll_ce_lora import CELoRA
from ll_corda.start import CorDA
from ll_dora import DoRA
from ll_eva.start import EVA
from ll_loftq.start import LoftQ
from ll_lora import LoRA
from ll_lora_ga.start import LoRAGA
from ll_lorasc import LoRASC
from ll_olora.start import OLoRA
from ll_pissa.start import PiSSA
from ll_riemannian_moe import MoELoRA
from ll_rose import RoseLoRA
from lora_lightning.adapters.pair import PairAdapter
from lora_lightning.adapters.starts import Factors
from lora_lightning.errors import ModelError, SettingsError
from lora_lightning.injection.probe import Probe
from lora_lightning.injection.records import adapters_named
from lora_lightning.testing import BASE_KINDS, MethodContract, TinyMLP, perturb

pytestmark = [
    *PEFT_WARNINGS,
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]
S = 1.5
"""Scaling of rank 2 and alpha 3."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


BATCHES = [{"x": drawn(12, 6, seed=n), "labels": drawn(12, seed=n + 9)} for n in range(2)]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    y = model(batch["x"])
    wanted = torch.sin(batch["labels"][..., None] * torch.arange(1, y.shape[-1] + 1))  # a gradient of full rank
    return (y - wanted).square().mean()


def probe() -> Probe:
    return Probe(BATCHES, loss)


def started(method: Any, dtype: torch.dtype = torch.float64) -> tuple[TinyMLP, TinyMLP]:
    torch.manual_seed(3)
    plain = TinyMLP().to(dtype).eval()
    model = copy.deepcopy(plain)
    calibration = probe() if dtype == torch.float64 else None
    ll.inject(model, method, ["first", "second"], also_train=(), seed=0, probe=calibration)
    return plain, model


def pair(model: TinyMLP, name: str = "first") -> PairAdapter:
    return cast(PairAdapter, adapters_named(model, "default")[name])


STARTS = {"PiSSA": PiSSA(), "OLoRA": OLoRA(), "LoRAGA": LoRAGA(batches=2), "CorDA": CorDA(batches=2)}
METHODS = {
    "LoRA": lambda init: LoRA(rank=2, alpha=3.0, init=init),
    "LoRA in cheapest order": lambda init: LoRA(rank=2, alpha=3.0, order="flops", init=init),
    "DoRA": lambda init: DoRA(rank=2, alpha=3.0, init=init),
    "RoseLoRA": lambda init: RoseLoRA(rank=2, alpha=3.0, init=init),
    "CELoRA": lambda init: CELoRA(rank=2, alpha=3.0, svd_rank=2, init=init),
    "LoRASC": lambda init: LoRASC(inner=LoRA(rank=2, alpha=3.0, init=init)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", [*STARTS, "EVA"])
def test_every_method_of_one_pair_begins_at_the_base_model_whose_weights_stay(method, start):
    plain, model = started(METHODS[method](EVA(batches=2, rho=1.0) if start == "EVA" else STARTS[start]))
    x = drawn(5, 6, seed=7)
    if method == "DoRA":
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-13)
    else:
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model.first.base.weight, plain.first.weight)
    adapter = pair(model)
    assert bool(adapter.lora_A.any())
    assert bool(adapter.lora_B.any()) == (start != "EVA")


@pytest.mark.parametrize("method", METHODS)
def test_the_merged_weight_is_that_of_a_residual_weight(method):
    """The papers' form: W - s B0 A0 is written, and the method works on that."""
    plain, model = started(METHODS[method](PiSSA()))
    adapter = pair(model)
    A0, B0 = adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone()
    perturb(adapter, seed=3)
    W = plain.first.weight.detach()
    residual = W - S * B0 @ A0
    V = residual + S * adapter.lora_B.detach() @ adapter.lora_A.detach()
    if method == "DoRA":
        V = V * (cast(Any, adapter).magnitude.detach() / V.norm(dim=1))[:, None]
    torch.testing.assert_close(model.first.merged_weight("default", torch.float64), V, rtol=0, atol=1e-12)
    x = drawn(5, 6, seed=7)
    torch.testing.assert_close(model.first(x), x @ V.mT + plain.first.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["PiSSA", "OLoRA"])
def test_in_less_precision_it_is_exact_too(start, dtype):
    plain, model = started(LoRA(rank=2, alpha=3.0, init=STARTS[start]), dtype)
    x = drawn(5, 6).to(dtype)
    assert torch.equal(model(x), plain(x))


# -- PiSSA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 3.0, 16.0])
def test_pissa_is_the_best_approximation_whatever_the_scaling(alpha):
    plain, model = started(LoRA(rank=2, alpha=alpha, init=PiSSA()))
    W, A, B = plain.first.weight.detach().numpy(), *(f.detach().numpy() for f in pair(model).factors())
    A, B, s = A[:2], B[:, :2], alpha / 2
    U, sigma, Vh = np.linalg.svd(W)
    np.testing.assert_allclose(s * B @ A, (U[:, :2] * sigma[:2]) @ Vh[:2], atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(W - s * B @ A, 2), sigma[2], atol=1e-13)
    for gram in (A @ A.T, B.T @ B):
        np.testing.assert_allclose(gram, np.diag(sigma[:2] / s), atol=1e-13)


def test_pissa_of_the_other_end_and_by_iterations():
    plain, model = started(LoRA(rank=2, alpha=2.0, init=PiSSA(part="trailing")))
    W = plain.second.weight.detach().numpy()
    product = (pair(model, "second").lora_B @ pair(model, "second").lora_A).detach().numpy()
    U, sigma, Vh = np.linalg.svd(W, full_matrices=False)
    np.testing.assert_allclose(product, (U[:, -2:] * sigma[-2:]) @ Vh[-2:], atol=1e-13)
    plain, model = started(LoRA(rank=2, alpha=2.0, init=PiSSA(power_iterations=16)))
    W = plain.first.weight.detach().numpy()
    product = (pair(model).lora_B @ pair(model).lora_A).detach().numpy()
    assert np.linalg.norm(W - product, 2) == pytest.approx(np.linalg.svd(W, compute_uv=False)[2], rel=1e-3)


# -- OLoRA -------------------------------------------------------------------------------------------------------------


def test_olora_is_a_qr_decomposition():
    plain, model = started(LoRA(rank=2, alpha=3.0, init=OLoRA()))
    Q, R = np.linalg.qr(plain.first.weight.detach().numpy())
    np.testing.assert_allclose(pair(model).lora_B.detach(), Q[:, :2], atol=1e-14)
    np.testing.assert_allclose(pair(model).lora_A.detach(), R[:2], atol=1e-14)
    np.testing.assert_allclose(Q[:, :2].T @ Q[:, :2], np.eye(2), atol=1e-14)


# -- EVA ---------------------------------------------------------------------------------------------------------------


def inputs(plain: TinyMLP, layer: str) -> np.ndarray:
    seen = []
    handle = getattr(plain, layer).register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    for batch in BATCHES:
        plain(batch["x"])
    handle.remove()
    return np.concatenate([x.reshape(-1, x.shape[-1]).numpy() for x in seen])


def test_eva_starts_at_principal_directions():
    plain, model = started(LoRA(rank=2, alpha=3.0, init=EVA(batches=2, rho=1.0)))
    for layer in ("first", "second"):
        x = inputs(plain, layer)
        _, sigma, Vh = np.linalg.svd(x - x.mean(axis=0))
        A = pair(model, layer).lora_A.detach().numpy()
        np.testing.assert_allclose(A @ A.T, np.eye(2), atol=1e-12)
        np.testing.assert_allclose(A.T @ A, Vh[:2].T @ Vh[:2], atol=1e-10)
        whitened = pair(started(LoRA(rank=2, init=EVA(batches=2, rho=1.0, whiten=True)))[1], layer).lora_A.detach()
        ratio = (whitened.norm(dim=1)[0] / whitened.norm(dim=1)[1]).item()
        assert ratio == pytest.approx((sigma[1] / sigma[0]) ** 0.5, rel=1e-9)


def test_eva_gives_ranks_to_the_directions_that_explain_most():
    plain, model = started(LoRA(rank=2, alpha=4.0, init=EVA(batches=2, rho=2.0)))
    shares = []
    for layer in ("first", "second"):
        x = inputs(plain, layer)
        variances = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2
        shares += [(share, layer) for share in (variances / variances.sum())[:4]]
    best = [layer for _, layer in sorted(shares, reverse=True)[:4]]
    ranks = {name: adapter.rank for name, adapter in adapters_named(model, "default").items()}
    assert ranks == {name: best.count(name) for name in ("first", "second") if name in best}
    assert sum(ranks.values()) <= 4
    assert {adapter.scaling for adapter in adapters_named(model, "default").values()} == {2.0}


# -- LoRA-GA -----------------------------------------------------------------------------------------------------------


def mean_gradient(plain: TinyMLP, layer: str) -> np.ndarray:
    weight = getattr(plain, layer).weight.requires_grad_()
    (sum(loss(plain, batch) for batch in BATCHES) / len(BATCHES)).backward()
    return weight.grad.numpy()


@pytest.mark.parametrize(
    ("direction", "right", "left"),
    [("ArB2r", [0, 1], [2, 3]), ("A2rBr", [2, 3], [0, 1]), ("ArBr", [1, 3], [0, 2])],
)
def test_lora_ga_starts_at_singular_vectors_of_the_gradient(direction, right, left):
    plain, model = started(LoRA(rank=2, alpha=3.0, init=LoRAGA(batches=2, direction=direction)))
    U, _, Vh = np.linalg.svd(mean_gradient(plain, "first"))
    length = plain.first.out_features**0.25 / 4.0
    A, B = pair(model).lora_A.detach().numpy(), pair(model).lora_B.detach().numpy()
    np.testing.assert_allclose(np.abs(A @ Vh[right].T), length * np.eye(2), atol=1e-10)
    np.testing.assert_allclose(np.abs(U[:, left].T @ B), length * np.eye(2), atol=1e-10)
    assert all(parameter.grad is None for parameter in model.first.base.parameters())


def test_lora_ga_at_other_lengths_and_on_narrow_layers():
    plain, model = started(LoRA(rank=2, alpha=3.0, init=LoRAGA(batches=2, scale="peft")))
    _, sigma, _ = np.linalg.svd(mean_gradient(plain, "first"))
    lengths = pair(model).lora_B.detach().norm(dim=0).numpy()
    np.testing.assert_allclose(lengths, sigma[2:4] * plain.first.out_features**0.25 / 4.0, rtol=1e-9)
    narrow = min(plain.second.weight.shape)
    _, model = started(LoRA(rank=narrow, alpha=3.0, init=LoRAGA(batches=2, scale="unit")))
    B = pair(model, "second").lora_B.detach().numpy()
    np.testing.assert_allclose(B.T @ B, np.eye(narrow), atol=1e-10)


# -- CorDA -------------------------------------------------------------------------------------------------------------


def test_corda_decomposes_the_weight_as_inputs_see_it():
    plain, model = started(LoRA(rank=2, alpha=3.0, init=CorDA(batches=2, damping=0.01)))
    _, rest = started(LoRA(rank=min(plain.first.weight.shape) - 2, alpha=3.0, init=CorDA(batches=2, mode="knowledge")))
    W = plain.first.weight.detach().numpy()
    x = [batch["x"].numpy() / abs(batch["x"].max().item()) for batch in BATCHES]
    C = sum(rows.T @ rows for rows in x) / sum(map(len, x))  # a sample is a row here
    C = C + 0.01 * C.diagonal().mean() * np.eye(len(C))
    U, sigma, Vh = np.linalg.svd(W @ C, full_matrices=False)
    leading = (U[:, :2] * sigma[:2]) @ Vh[:2] @ np.linalg.inv(C)
    product = S * (pair(model).lora_B @ pair(model).lora_A).detach().numpy()
    np.testing.assert_allclose(product, leading, atol=1e-12)
    other = pair(rest)
    np.testing.assert_allclose(product + other.scaling * (other.lora_B @ other.lora_A).detach().numpy(), W, atol=1e-10)


def test_corda_of_inputs_without_a_direction_is_pissa():
    from lora_lightning.adapters.starts import context_start, weight_start

    W = drawn(5, 6)
    ours, theirs = context_start(W, torch.eye(6), 2, S, "leading", 1e-12), weight_start(W, 2, S)
    torch.testing.assert_close(ours.B @ ours.A, theirs.B @ theirs.A, rtol=0, atol=1e-9)


# -- LoftQ -------------------------------------------------------------------------------------------------------------


def quantized(folder: Any, step: float) -> TinyMLP:
    """A model whose weights are rounded to multiples of `step`, with the full ones in `folder`."""
    from safetensors.torch import save_file

    torch.manual_seed(3)
    plain = TinyMLP().double()
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in plain.state_dict().items()}, folder / "model.safetensors")
    with torch.no_grad():
        for layer in (plain.first, plain.second):
            layer.weight.copy_((layer.weight / step).round() * step if step else layer.weight)
    return plain.eval()


def test_loftq_starts_at_what_was_lost(tmp_path):
    full = quantized(tmp_path / "full", 0.0)
    errors = []
    for rank in (1, 2, 4):
        model = quantized(tmp_path / "full", 0.25)
        Q = model.first.weight.detach().clone()
        ll.inject(model, LoRA(rank=rank, alpha=3.0, init=LoftQ(weights=str(tmp_path / "full"))), ["first"], seed=0)
        lost = (full.first.weight - Q).detach().numpy()
        U, sigma, Vh = np.linalg.svd(lost, full_matrices=False)
        product = 3.0 / rank * (pair(model).lora_B @ pair(model).lora_A).detach().numpy()
        np.testing.assert_allclose(product, (U[:, :rank] * sigma[:rank]) @ Vh[:rank], atol=1e-12)
        merged = model.first.merged_weight("default", torch.float64)
        errors.append(float((full.first.weight - merged).detach().norm()))
        assert torch.equal(model.first.base.weight, Q)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < np.linalg.norm(lost)


def test_loftq_where_nothing_is_lost_or_another_model_was_quantized(tmp_path):
    model = quantized(tmp_path / "full", 0.0)
    with pytest.raises(SettingsError, match=r"LoftQ on first: quantization has lost nothing .*model\.quantization"):
        ll.inject(model, LoRA(init=LoftQ(weights=str(tmp_path / "full")), rank=2), ["first"])
    other = TinyMLP().double()
    nn.init.normal_(other.first.weight)
    with pytest.raises(ModelError, match=r"its first differs from the quantized weight .* another model"):
        ll.inject(other, LoRA(init=LoftQ(weights=str(tmp_path / "full")), rank=2), ["first"])
    with pytest.raises(SettingsError, match=r"LoftQ\.weights is .*; it must be the folder"):
        LoftQ()
    with pytest.raises(ModelError, match=r'LoftQ\.weights is ".*"; no such folder'):
        ll.inject(TinyMLP().double(), LoRA(init=LoftQ(weights=str(tmp_path / "none")), rank=2), ["first"])


# -- as settings -------------------------------------------------------------------------------------------------------


def test_methods_without_one_pair_refuse_a_start():
    with pytest.raises(SettingsError, match=r"MoELoRA on first: init is PiSSA, and .* is not made of one pair"):
        ll.inject(TinyMLP(), MoELoRA(rank=2, init=PiSSA()), ["first"])
    with pytest.raises(SettingsError, match=r"no factors that could start anywhere; leave init out"):
        ll.inject(TinyMLP(), DoRA(mode="magnitude", init=PiSSA()), ["first"])
    with pytest.raises(SettingsError, match=r"LoRA\.init is 'pissa'; it must be a start"):
        LoRA(init=cast(Any, "pissa"))
    with pytest.raises(SettingsError, match=r"overrides\[\"first\"\]: LoRA\.init holds for the whole run"):
        ll.inject(TinyMLP(), LoRA(rank=2, init=PiSSA()), ["first"], overrides={"first": {"init": OLoRA()}})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PiSSA(power_iterations=-1), r"PiSSA\.power_iterations is -1; it must be a whole number, or null"),
        (lambda: PiSSA(power_iterations=4, part="trailing"), r'finds part "leading" alone'),
        (lambda: EVA(batches=0), r"EVA\.batches is 0; it must be at least 1"),
        (lambda: EVA(rho=0.5), r"EVA\.rho is 0\.5; it must be at least 1"),
        (lambda: LoRAGA(gamma=0.0), r"LoRAGA\.gamma is 0\.0; it must be above 0"),
        (lambda: CorDA(damping=0.0), r"CorDA\.damping is 0\.0; it must be above 0"),
        (lambda: CorDA(mode=cast(Any, "other")), r'CorDA\.mode is "other"'),
    ],
)
def test_settings_outside_their_rules(make, said):
    with pytest.raises(SettingsError, match=said):
        make()


@pytest.mark.parametrize("start", [*STARTS, "EVA"])
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "LoRASC"])
def test_saved_loaded_and_merged_it_is_the_same(method, start, tmp_path):
    plain, model = started(METHODS[method](EVA(batches=2) if start == "EVA" else STARTS[start]))
    for adapter in adapters_named(model, "default").values():
        perturb(adapter, seed=3)
    x = drawn(5, 6, seed=7)
    adapted = model(x)
    ll.save_adapter(model, tmp_path / "adapter")
    fresh = copy.deepcopy(plain)
    ll.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), adapted)
    ll.merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-11)
    ll.unmerge(model)
    assert torch.equal(model(x), adapted)
    ll.eject(model)
    assert torch.equal(model(x), plain(x))


@pytest.mark.slow
class TestLoRAFromPiSSA(MethodContract):
    method = LoRA(rank=2, alpha=3.0, init=PiSSA())
    random_start = False


@pytest.mark.slow
class TestLoRAFromOLoRA(MethodContract):
    method = LoRA(rank=2, alpha=3.0, init=OLoRA())
    random_start = False


@pytest.mark.slow
class TestRoseLoRAFromOLoRA(MethodContract):
    method = RoseLoRA(rank=2, alpha=3.0, init=OLoRA())
    random_start = False


@pytest.mark.slow
class TestCELoRAFromPiSSA(MethodContract):
    method = CELoRA(rank=2, alpha=3.0, svd_rank=2, init=PiSSA())
    random_start = False
    base_kinds = tuple(kind for kind in BASE_KINDS if not kind.startswith(("Conv1d", "Conv2d", "Embedding")))


# -- beside peft -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two linear layers, as peft takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def net() -> Net:
    torch.manual_seed(5)
    return Net().eval()


def peft_model(model: Net, init: str, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=3.0, target_modules=["first", "second"], init_lora_weights=init, **options)
    return config, lambda: peft.get_peft_model(model, config)


def theirs(init: str) -> Any:
    """A peft model with this start, on the batches in float32."""
    peft = pytest.importorskip("peft")
    model, batches = net(), [{name: value.float()[None] for name, value in batch.items()} for batch in BATCHES]
    if init == "lora_ga":
        config, make = peft_model(model, init, lora_ga_config=peft.LoraGAConfig())

        def backward() -> None:
            for batch in batches:
                (loss(model, batch) / len(batches)).backward()

        importlib.import_module("peft.tuners.lora.loraga").preprocess_loraga(model, config, backward)
    elif init == "corda":
        config, make = peft_model(model, init, corda_config=peft.tuners.lora.config.CordaConfig(corda_method="ipm"))
        importlib.import_module("peft.tuners.lora.corda").preprocess_corda(
            model, config, run_model=lambda: [model(b["x"]) for b in batches]
        )
    else:
        _, make = peft_model(model, init)
    return make()


OURS = {"pissa": PiSSA(), "olora": OLoRA(), "lora_ga": LoRAGA(batches=2, scale="peft"), "corda": CorDA(batches=2)}


@torch.no_grad()
def align(other: Any, model: Net) -> None:
    """Give each component of peft's start the sign that ours has."""
    for name in ("first", "second"):
        layer, ours = getattr(other.base_model.model, name), pair(cast(Any, model), name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer.base_layer.weight += S * B @ A
        A.mul_((A * ours.lora_A).sum(dim=1, keepdim=True).sign())
        B.mul_((B * ours.lora_B).sum(dim=0).sign())
        layer.base_layer.weight -= S * B @ A
        # peft's sketch in float32 is less exact where singular values are small; the steps start at the same numbers
        torch.testing.assert_close(ours.lora_A, A, rtol=0, atol=2e-2)
        torch.testing.assert_close(ours.lora_B, B, rtol=0, atol=2e-2)
        ours.start_at(Factors(A.clone(), B.clone()))


@pytest.mark.parametrize("init", OURS)
def test_outputs_gradients_and_five_steps_equal_pefts(init):
    """Paired signs of singular vectors are free, and change no step of AdamW."""
    other, model = theirs(init), net()
    batches = [{name: value.float()[None] for name, value in batch.items()} for batch in BATCHES]
    ll.inject(model, LoRA(rank=2, alpha=3.0, init=OURS[init]), ["first", "second"], also_train=(), seed=0,
              probe=Probe(batches, loss))  # fmt: skip
    if init == "lora_ga":  # its sides come from different triplets, whose signs are not paired
        align(other, model)
    x = drawn(7, 6, seed=9).float()
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (model, other)]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0) for parameters in trained]
    for step in range(5):
        torch.testing.assert_close(model(x), other(x), rtol=0, atol=2e-5)
        for module, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            loss(module, batches[step % 2]).backward()
        norms = [torch.stack([p.grad.norm() for p in parameters]).norm() for parameters in trained]
        torch.testing.assert_close(norms[0], norms[1], rtol=2e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=1e-4)


def test_eva_spans_what_peft_finds():
    peft = pytest.importorskip("peft")
    base = drawn(2, 6, seed=4)
    batches = [{"x": (drawn(40, 2, seed=n) @ base).float()} for n in range(4)]  # inputs of two directions
    model = net()
    ll.inject(model, LoRA(rank=2, alpha=3.0, init=EVA(batches=4, rho=1.0)), ["first"], also_train=(), seed=0,
              probe=Probe(batches, lambda m, b: m(b["x"]).sum()))  # fmt: skip
    config = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights="eva",
                             eva_config=peft.EvaConfig(rho=1.0))  # fmt: skip
    other = peft.get_peft_model(net(), config)
    peft.initialize_lora_eva_weights(other, batches, forward_fn=lambda m, b: m(b["x"]),
                                     prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
                                     show_progress_bar=False)  # fmt: skip
    A, B = pair(model).lora_A.detach(), other.base_model.model.first.lora_A["default"].weight.detach()
    torch.testing.assert_close(A.mT @ A, B.mT @ B, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
@pytest.mark.parametrize("start", STARTS)
def test_peft_reads_an_export_on_the_untouched_model(method, start, tmp_path):
    peft = pytest.importorskip("peft")
    from peft_models import llama

    model = llama()
    tokens = [
        {"input_ids": torch.arange(3 + n, 11 + n)[None], "labels": torch.arange(3 + n, 11 + n)[None]} for n in range(2)
    ]
    settings = METHODS[method](STARTS[start])
    ll.inject(model, settings, ["q_proj", "v_proj"], also_train=(), seed=0, probe=Probe(tokens))
    for adapter in adapters_named(model, "default").values():
        perturb(adapter, seed=3)
    expected = model(tokens[0]["input_ids"]).logits
    ll.export(model, tmp_path / "peft", "peft")
    plain = llama()
    read = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    assert read.peft_config["default"].r == 4
    assert read.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(read(tokens[0]["input_ids"]).logits, expected, rtol=0, atol=2e-5)
