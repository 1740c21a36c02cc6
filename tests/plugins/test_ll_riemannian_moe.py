"""MoELoRA: the contract, the gated product against dense references, and every law of routing and rescaling."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from projects import Plain, fit
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy_runs import classification, encoder_folder, labelled_data, trainer

from ll_riemannian_moe import MoELoRA
from ll_riemannian_moe.adapter import MoELoRAAdapter
from ll_riemannian_moe.callback import RouterStatistics
from ll_riemannian_moe.functional import (
    balance_loss,
    gated_experts,
    gates,
    load_statistics,
    router_logits,
    z_loss,
)
from lora_lightning import plugins
from lora_lightning.adapters.base import RunningSum
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.callbacks import InjectAdapters, TrainingGuard
from lora_lightning.errors import AdapterStateError, NoEffectError, PluginError, SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named, trainable_adapters
from lora_lightning.optim.groups import build_optimizer, group_specs
from lora_lightning.testing import MethodContract, perturb

EXPONENTS = (1.0, 0.5, 0.0)
LINEAR = ("Linear", "Linear without bias", "Conv1D")


class TestMoELoRA(MethodContract):
    method = MoELoRA(experts=3, top_k=2, rank=2, alpha=4.0, router_lr_ratio=1.0)
    base_kinds = LINEAR


class TestOneExpertATokenWithLossesAndDropout(MethodContract):
    method = MoELoRA(
        experts=4, top_k=1, rank=2, alpha=4.0, gate_exponent=0.0, dropout=0.2, balance_loss=0.1, z_loss=0.01
    )
    base_kinds = LINEAR
    repeated = ("test_compiles",)


@pytest.mark.slow
class TestOneExpert(MethodContract):
    method = MoELoRA(experts=1, top_k=1, rank=2, alpha=4.0, gate_exponent=1.0)
    base_kinds = LINEAR


# -- an independent float64 reference, token by token and expert by expert ---------------------------------------------

N, D_IN, D_OUT, E, K, R, S = 7, 6, 5, 4, 2, 2, 1.5


def randn(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(seed=0, n=N, experts=E):
    """W, bias, x, A, B, router; the last four as leaves."""
    shapes = [(D_OUT, D_IN), (D_OUT,), (n, D_IN), (experts, R, D_IN), (experts, D_OUT, R), (experts, D_IN)]
    made = [randn(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    return *made[:2], *(t.requires_grad_() for t in made[2:])


def reference(W, b, x, A, B, router, q, top_k=K):
    """y_i = c_i e_i + (g_i - c_i) stop(e_i), c_i = stop(g_i^q), from the full softmax, by plain loops."""
    outputs = []
    for token in x:
        p = torch.softmax(router @ token, 0)
        order = sorted(range(len(p)), key=lambda i: -float(p[i].detach()))[:top_k]
        total = sum(p[i] for i in order)
        y = W @ token + b
        for i in order:
            g = p[i] / total
            e = S * (B[i] @ (A[i] @ token))
            c = g.detach() ** q
            y = y + c * e + (g - c) * e.detach()
        outputs.append(y)
    return torch.stack(outputs)


def ours(W, b, x, A, B, router, q, top_k=K):
    g = gates(router_logits(x, router), top_k)
    return gated_experts(x @ W.T + b, x, A, B, g, scaling=S, exponent=q)


def gradients(output, leaves, d):
    return torch.autograd.grad((output * d).sum(), leaves)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- forward and backward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [*EXPONENTS, 0.3])
@pytest.mark.parametrize("top_k", [2, 3, E])
def test_output_and_gradients_equal_the_dense_reference(q, top_k):
    W, b, *leaves = tensors()
    d = randn(N, D_OUT, seed=20)
    expected, found = reference(W, b, *leaves, q, top_k), ours(W, b, *leaves, q, top_k)
    close(found, expected)
    for a, e in zip(gradients(found, leaves, d), gradients(expected, leaves, d), strict=True):
        close(a, e)


def test_exponent_one_is_the_true_gradient():
    W, b, x, A, B, router = tensors(n=3)
    mask = torch.tensor([0, 1, 1, 1, 0, 1], dtype=torch.uint8).expand(3, -1).contiguous()

    def f(x, A, B, logits):
        return gated_experts(x @ W.T + b, x, A, B, gates(logits, K), scaling=S, exponent=1.0, mask=mask)

    logits = router_logits(x, router).detach().requires_grad_()
    assert torch.autograd.gradcheck(f, (x, A, B, logits))
    assert torch.autograd.gradcheck(router_logits, (x, router))


def test_outputs_and_router_gradients_are_the_same_for_every_exponent():
    W, b, *leaves = tensors()
    outputs = [ours(W, b, *leaves, q) for q in EXPONENTS]
    routers = [torch.autograd.grad(y.square().sum(), leaves[3])[0] for y in outputs]
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert all(torch.equal(g, routers[0]) for g in routers)


def test_router_gradient_has_its_closed_form():
    """dL/dl_j = g_j (d.e_j - sum_i g_i d.e_i) for selected j, zero otherwise."""
    _, _, x, A, B, router = tensors(n=1)
    d = randn(D_OUT, seed=20)
    logits = (router @ x[0]).detach().requires_grad_()
    g = gates(logits[None], K)
    y = gated_experts(torch.zeros(1, D_OUT, dtype=torch.float64), x, A, B, g, scaling=S, exponent=0.5)
    (found,) = torch.autograd.grad((y * d).sum(), logits)
    score = torch.stack([S * d @ B[i] @ A[i] @ x[0] for i in range(E)]).detach()
    close(found, (g[0] * (score - (g[0] * score).sum())).detach())
    assert int((found != 0).sum()) == K


@pytest.mark.parametrize("q", EXPONENTS)
def test_one_tokens_expert_gradients_scale_as_the_gate_to_the_exponent(q):
    W, b, x, A, B, router = tensors(n=1)
    d = randn(D_OUT, seed=20)
    g = gates(router_logits(x, router), K).detach()[0]
    dA, dB = gradients(ours(W, b, x, A, B, router, q), [A, B], d)
    for i in range(E):
        c = float(g[i]) ** q if g[i] > 0 else 0.0
        close(dA[i], (c * S * torch.outer(B[i].T @ d, x[0])).detach())
        close(dB[i], (c * S * torch.outer(d, A[i] @ x[0])).detach())


def test_one_expert_a_token_makes_all_exponents_coincide():
    W, b, *leaves = tensors()
    found = [gradients(ours(W, b, *leaves, q, top_k=1), leaves, 1.0) for q in EXPONENTS]
    assert all(torch.equal(a, e) for grads in found for a, e in zip(grads, found[0], strict=True))
    assert not found[0][3].any()  # and the router learns nothing


def test_equal_gates_make_half_the_exponent_a_factor_sqrt_experts():
    W, b, x, A, B, router = tensors()
    with torch.no_grad():
        router.zero_()
    half, one = (gradients(ours(W, b, x, A, B, router, q, top_k=E), [A, B], 1.0) for q in (0.5, 1.0))
    for a, e in zip(half, one, strict=True):
        close(a, e * E**0.5)


@pytest.mark.parametrize("q", EXPONENTS)
def test_gates_of_zero_give_finite_gradients_and_none_to_their_experts(q):
    _, _, x, A, B, _ = tensors()
    logits = torch.tensor([[0.0, -1e4, 1.0, 0.5]], dtype=torch.float64).repeat(N, 1).requires_grad_()
    g = gates(logits, E)  # the second expert is selected, and its gate underflows to 0
    assert not g[:, 1].any()
    y = gated_experts(torch.zeros(N, D_OUT, dtype=torch.float64), x, A, B, g, scaling=S, exponent=q)
    found = gradients(y, [x, A, B, logits], 1.0)
    assert all(bool(torch.isfinite(grad).all()) for grad in found)
    assert not found[1][1].any()
    assert not found[2][1].any()


@pytest.mark.parametrize("q", EXPONENTS)
def test_first_order_law_of_preconditioned_descent(q):
    """One token: a step of size lr moves W + s sum g B A by -lr s^2 sum g^(1+q) (P_B D + D P_A)."""
    W, b, x, A, B, router = tensors(n=1, seed=40)
    d, lr = randn(D_OUT, seed=60), 1e-7
    g = gates(router_logits(x, router), K).detach()[0]
    dA, dB = gradients(ours(W, b, x, A, B, router, q), [A, B], d)
    D = torch.outer(d, x.detach()[0])
    moved, law = torch.zeros_like(W), torch.zeros_like(W)
    for i in range(E):
        Ai, Bi = A.detach()[i], B.detach()[i]
        step_A, step_B = torch.linalg.solve(Bi.T @ Bi, dA[i]), torch.linalg.solve(Ai @ Ai.T, dB[i], left=False)
        moved += S * g[i] * ((Bi - lr * step_B) @ (Ai - lr * step_A) - Bi @ Ai)
        P_B, P_A = Bi @ torch.linalg.pinv(Bi), torch.linalg.pinv(Ai) @ Ai
        law -= lr * S**2 * g[i] ** (1 + q) * (P_B @ D + D @ P_A)
    assert float((moved - law).norm() / law.norm()) < 1e-6


@pytest.mark.parametrize("q", EXPONENTS)
def test_preconditioned_step_does_not_see_the_gauge_of_an_expert(q):
    """(A_i, B_i) -> (Q A_i, B_i Q^-1), undamped: B_i A_i after the step is the same, not only to first order."""
    W, b, x, A, B, router = tensors()
    Q = randn(E, R, R, seed=70) + 3 * torch.eye(R, dtype=torch.float64)
    products = []
    for left, right in ((A, B), (Q @ A, B @ torch.linalg.inv(Q))):
        left, right = left.detach().requires_grad_(), right.detach().requires_grad_()
        dA, dB = gradients(ours(W, b, x, left, right, router, q), [left, right], 1.0)
        step_A = torch.linalg.solve(right.mT @ right, dA)
        step_B = torch.linalg.solve(left @ left.mT, dB, left=False)
        products.append(((right - 0.1 * step_B) @ (left - 0.1 * step_A)).detach())
    close(products[0], products[1], 1e-10)


def test_the_product_may_be_changed_in_place():
    W, b, *leaves = tensors()
    ours(W, b, *leaves, 0.5).relu_().sum().backward()
    assert leaves[1].grad.any()


def test_half_precision_keeps_gates_and_losses_in_float32():
    x = randn(5, D_IN).to(torch.bfloat16)
    router = randn(20, D_IN, seed=1).float()
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            logits = router_logits(x, router)
            g = gates(logits, 3)
        assert logits.dtype == g.dtype == z_loss(logits).dtype == torch.float32
        close(logits, x.float() @ router.T, 1e-6)
    assert router_logits(x.double(), router.double()).dtype == torch.float64


def test_autocast_gradients_are_near_the_exact_ones_and_keep_their_dtypes():
    W, b, x, A, B, router = (t.detach().float().requires_grad_() for t in tensors())
    exact = gradients(ours(W, b, x, A, B, router, 0.5), [x, A, B, router], 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_experts(
            nn.functional.linear(x, W, b), x, A, B, gates(router_logits(x, router), K), scaling=S, exponent=0.5
        )
    assert y.dtype == torch.bfloat16
    for a, e in zip(gradients(y.float(), [x, A, B, router], 1.0), exact, strict=True):
        assert a.dtype == torch.float32
        assert float((a - e).norm() / e.norm()) < 0.03


# -- gates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_gates_are_the_selected_probabilities_over_their_sum(top_k):
    logits = randn(50, E)
    g, p = gates(logits, top_k), torch.softmax(logits, -1)
    close(g.sum(-1), torch.ones(50, dtype=torch.float64))
    assert bool(((g > 0).sum(-1) == top_k).all())
    kept = p * (p >= p.sort(-1, descending=True).values[:, top_k - 1 : top_k])
    close(g, kept / kept.sum(-1, keepdim=True))


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_equal_logits_choose_no_more_experts(top_k):
    logits = torch.zeros(6, E, dtype=torch.float64, requires_grad=True)
    g = gates(logits, top_k)
    assert torch.equal((g > 0).sum(-1), torch.full((6,), top_k))
    close(g.sum(-1), torch.ones(6, dtype=torch.float64))
    g.square().sum().backward()
    assert bool(torch.isfinite(logits.grad).all())


# -- the adapter -------------------------------------------------------------------------------------------------------


def adapted(method=None, dtype=torch.float64, moved=True, d_in=D_IN, d_out=D_OUT):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out, dtype=dtype))
    inject(model, method or MoELoRA(experts=E, top_k=K, rank=R, alpha=3.0), seed=0)
    (adapter,) = trainable_adapters(model).values()
    if moved:
        perturb(adapter)
    return model, adapter


def settings(**fields):
    return MoELoRA(**{"experts": E, "top_k": K, "rank": R, "alpha": 3.0, **fields})


def test_experts_start_apart_uniform_and_with_no_output():
    _, adapter = adapted(moved=False, d_in=400, d_out=50)
    for tensor in (adapter.lora_A, adapter.router):
        assert float(tensor.detach().abs().max()) <= 400**-0.5
        assert float(tensor.detach().std()) == pytest.approx(400**-0.5 / 3**0.5, rel=0.1)
    assert not adapter.lora_B.any()
    assert all(not torch.equal(adapter.lora_A[0], adapter.lora_A[i]) for i in range(1, E))


def test_first_step_moves_only_B():
    """B = 0: the gradients of A and of the router are exactly zero, whatever a preconditioner makes of them."""
    model, adapter = adapted(moved=False)
    model(randn(N, D_IN)).square().sum().backward()
    assert not adapter.lora_A.grad.any()
    assert not adapter.router.grad.any()
    assert adapter.lora_B.grad.any()
    damped = torch.linalg.solve(1e-6 * torch.eye(R).double().expand(E, R, R), adapter.lora_A.grad)
    assert not damped.any()


def test_scaling_is_alpha_over_rank_and_reaches_the_output():
    model, adapter = adapted()
    assert settings().scaling == S
    x = randn(N, D_IN)
    W, b = model[0].base.weight, model[0].base.bias
    close(model(x), reference(W, b, x, adapter.lora_A, adapter.lora_B, adapter.router, 0.5))


def test_dropout_has_one_mask_for_all_experts():
    model, adapter = adapted(settings(dropout=0.5))
    with torch.no_grad():
        adapter.lora_A.copy_(adapter.lora_A[:1].expand_as(adapter.lora_A))  # equal experts: gates do not matter
        adapter.lora_B.copy_(adapter.lora_B[:1].expand_as(adapter.lora_B))
        x = randn(200, D_IN)
        update = model.train()(x) - model[0].base(x)
        masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * D_IN)
        kept = []
        for token, out in zip(x, update, strict=True):
            apart = (S * (2 * masks * token) @ adapter.lora_A[0].T @ adapter.lora_B[0].T - out).norm(dim=1)
            assert float(apart.min()) < 1e-10
            kept.append(masks[apart.argmin()])
    assert float(torch.stack(kept).mean()) == pytest.approx(0.5, abs=0.05)


def test_dropout_spares_the_router():
    model, adapter = adapted(method := settings(dropout=0.5, z_loss=1.0))
    x = randn(N, D_IN)
    model.train()(x)
    close(method.penalty({"0": adapter}), z_loss(router_logits(x, adapter.router)))


def test_expert_order_does_not_matter_in_training():
    order = torch.tensor([2, 0, 3, 1])
    runs = []
    for permuted in (False, True):
        model, adapter = adapted(settings(balance_loss=0.1, z_loss=0.1))
        if permuted:
            with torch.no_grad():
                for p in adapter.parameters():
                    p.copy_(p[order])
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            loss = model(randn(N, D_IN, seed=step)).square().sum()
            (loss + settings(balance_loss=0.1, z_loss=0.1).penalty({"0": adapter})).backward()
            optimizer.step()
        runs.append([p.detach() for p in adapter.parameters()])
    for one, two in zip(*runs, strict=True):
        close(one[order], two, 1e-9)


def test_an_unselected_expert_has_a_zero_gradient_and_drifts_under_adamw():
    model, adapter = adapted()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, weight_decay=0.0)
    model(randn(50, D_IN)).square().sum().backward()
    optimizer.step()
    before = copy.deepcopy(adapter.lora_B.detach())
    optimizer.zero_grad()
    x = randn(1, D_IN, seed=3)
    unused = (gates(router_logits(x, adapter.router), K)[0] == 0).nonzero().flatten()
    assert len(unused) == E - K
    model(x).square().sum().backward()
    for parameter in adapter.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[unused].any()
    optimizer.step()
    assert bool((adapter.lora_B[unused] != before[unused]).any())


def test_two_halves_of_a_batch_give_the_gradient_of_the_whole():
    """Which is also what two processes with half a batch each average to."""
    x, y = randn(8, D_IN), randn(8, D_OUT, seed=1)
    found = []
    for parts in (1, 2):
        model, adapter = adapted()
        for part, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (nn.functional.mse_loss(model(part), target) / parts).backward()
        found.append([p.grad for p in adapter.parameters()])
    for whole, halves in zip(*found, strict=True):
        close(whole, halves)


def test_groups_hold_sides_and_routers_with_their_rate_and_clipping():
    model, adapter = adapted(settings(router_lr_ratio=0.25, router_clip=0.5))
    specs = group_specs(model)
    assert {name: list(spec.params) for name, spec in specs.items()} == {
        "A": [adapter.lora_A],
        "B": [adapter.lora_B],
        "router": [adapter.router],
    }
    assert (specs["router"].lr_ratio, specs["router"].clip) == (0.25, 0.5)
    assert (specs["A"].lr_ratio, specs["A"].clip) == (1.0, None)


def test_the_factor_pair_has_the_experts_as_leading_axis():
    _, adapter = adapted()
    (pair,) = adapter.factor_pairs()
    assert (pair.lora_A.shape, pair.lora_B.shape, pair.scaling) == ((E, R, D_IN), (E, D_OUT, R), S)


# -- merging -----------------------------------------------------------------------------------------------------------


def merges_exactly(model, adapter):
    x = randn(N, D_IN, seed=9)
    base = model[0].base_layer
    close(model(x), base.apply(x, adapter.merged_weight(base.weight()), base.bias))


def test_a_single_expert_has_a_merged_weight():
    model, adapter = adapted(settings(experts=1, top_k=1))
    merges_exactly(model, adapter)
    weight = model[0].base.weight
    close(adapter.merged_weight(weight), weight + S * adapter.lora_B[0] @ adapter.lora_A[0])


def test_a_router_of_zeros_that_uses_all_experts_has_a_merged_weight():
    model, adapter = adapted(settings(top_k=E))
    with pytest.raises(AdapterStateError, match="4 of 4 experts are mixed token by token"):
        adapter.merged_weight(model[0].base.weight)
    with torch.no_grad():
        adapter.router.zero_()
    merges_exactly(model, adapter)
    total = sum(adapter.lora_B[i] @ adapter.lora_A[i] for i in range(E))
    close(adapter.merged_weight(model[0].base.weight), model[0].base.weight + S / E * total)


def test_fewer_experts_than_all_have_no_merged_weight_even_with_a_router_of_zeros():
    model, adapter = adapted()
    with torch.no_grad():
        adapter.router.zero_()
    with pytest.raises(AdapterStateError, match="depends on the input: 2 of 4 experts"):
        adapter.merged_weight(model[0].base.weight)


# -- losses ------------------------------------------------------------------------------------------------------------


def reference_losses(x, router, top_k=K):
    """Load-balance and z-loss by counting, E sum_i f_i mean_t p_i and mean_t logsumexp^2."""
    p = torch.softmax(x @ router.T, -1)
    chosen = [row.sort(descending=True).indices[:top_k].tolist() for row in p.detach()]
    f = [sum(i in picks for picks in chosen) / (len(x) * top_k) for i in range(len(router))]
    balance = len(router) * sum(f[i] * p[:, i].mean() for i in range(len(router)))
    return balance, torch.stack([torch.log(torch.exp(router @ t).sum()) ** 2 for t in x]).mean()


def test_losses_equal_their_definitions():
    x, router = randn(30, D_IN), randn(E, D_IN, seed=1)
    logits = router_logits(x, router)
    balance, z = reference_losses(x, router)
    close(balance_loss(logits, gates(logits, K)), balance)
    close(z_loss(logits), z)


def test_balance_loss_is_one_at_balance_and_largest_where_one_set_has_it_all():
    even = 1e-9 * torch.eye(4, dtype=torch.float64)
    assert float(balance_loss(even, gates(even, 1))) == pytest.approx(1.0)
    one = torch.tensor([[50.0, 0.0, 0.0, 0.0]], dtype=torch.float64).repeat(6, 1)
    assert float(balance_loss(one, gates(one, 1))) == pytest.approx(4.0)
    empty = torch.zeros(0, 4)
    assert float(balance_loss(empty, gates(empty, 2))) == float(z_loss(empty)) == 0.0


LOSSES = {"balance_loss": 0.3, "z_loss": 0.02}


def two_layers(method, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(D_IN, 8, dtype=torch.float64), nn.Tanh(), nn.Linear(8, D_OUT, dtype=torch.float64))
    inject(model, method, seed=0, also_train=())
    for i, adapter in enumerate(adapters_named(model, "default").values()):
        perturb(adapter, i)
    return model.train(), adapters_named(model, "default")


def test_penalty_is_the_mean_over_layers_and_has_the_gradient_of_plain_autograd():
    method = settings(gate_exponent=1.0, **LOSSES)
    model, adapters = two_layers(method)
    x = randn(N, D_IN)
    model(x)
    parameters = [p for a in adapters.values() for p in a.parameters()]
    first, second = adapters["0"], adapters["2"]
    hidden = torch.tanh(
        reference(model[0].base.weight, model[0].base.bias, x, first.lora_A, first.lora_B, first.router, 1.0)
    )
    parts = [reference_losses(x, first.router), reference_losses(hidden, second.router)]
    expected = sum(0.3 * balance + 0.02 * z for balance, z in parts) / 2
    found = method.penalty(adapters)
    close(found, expected)
    for a, e in zip(
        torch.autograd.grad(found, parameters, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        close(a, e, 1e-10)
    assert first.router.requires_grad


def train(recompute=False, forwards=1, batches=3, seed=4):
    method = settings(dropout=0.2, **LOSSES)
    model, adapters = two_layers(method)
    penalties = []
    torch.manual_seed(seed)
    for batch in range(batches):
        total = 0.0
        for part in range(forwards):
            x = randn(N, D_IN, seed=10 * batch + part)
            y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
            total = total + y.square().mean()
        penalty = method.penalty(adapters)
        penalties.append(float(penalty.detach()))
        (total + penalty).backward()
    return adapters, penalties


def test_recomputation_neither_doubles_the_penalty_nor_the_load():
    plain, recomputed = train(), train(recompute=True)
    assert plain[1] == recomputed[1]
    for path, adapter in plain[0].items():
        other = recomputed[0][path]
        for a, b in zip(adapter.parameters(), other.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
        assert torch.equal(adapter.load.sum, other.load.sum)
        assert adapter.load.count == other.load.count == 3 * N
        assert not adapter.pending.values
        assert not other.pending.values


def test_reentrant_recomputation_does_not_double_the_load():
    counts = []
    for recompute in (False, True):
        model, adapters = two_layers(settings())
        x = randn(N, D_IN).requires_grad_()
        y = checkpoint(model, x, use_reentrant=True) if recompute else model(x)
        y.sum().backward()
        counts.append([(adapter.load.sum.tolist(), adapter.load.count) for adapter in adapters.values()])
    assert counts[0] == counts[1]


def test_two_forwards_before_one_backward_give_the_mean_of_their_penalties():
    model, adapters = two_layers(method := settings(**LOSSES))
    alone = []
    for seed in (0, 1):
        model(randn(N, D_IN, seed=seed))
        alone.append(method.penalty(adapters))
    for seed in (0, 1):
        model(randn(N, D_IN, seed=seed))
    close(method.penalty(adapters), (alone[0] + alone[1]) / 2)
    assert train(forwards=2)[1] == train(forwards=2, recompute=True)[1]


def test_penalties_of_micro_batches_are_handed_over_once_each():
    """Accumulation: every micro-batch has its own penalty, the one of its own forward."""
    model, adapters = two_layers(method := settings(**LOSSES))
    for seed in range(3):
        model(randn(N, D_IN, seed=seed)).sum().backward(retain_graph=True)
        assert method.penalty(adapters) is None  # a backward has followed: too late
        model(randn(N, D_IN, seed=seed))
        assert method.penalty(adapters) is not None
        assert method.penalty(adapters) is None


def test_nothing_is_kept_outside_training_or_without_weights():
    model, adapters = two_layers(method := settings(**LOSSES))
    model.eval()(randn(N, D_IN)).sum().backward()
    for path, other in (("0", settings()), ("2", settings(**LOSSES))):
        assert other.penalty({path: adapters[path]}) is None
    assert all(a.load.sum is None and not a.pending.values for a in adapters.values())
    assert method.penalty(adapters) is None
    model, adapters = two_layers(settings())
    model(randn(N, D_IN))
    assert settings().penalty(adapters) is None
    assert not any(a.pending.values for a in adapters.values())


def test_a_copy_carries_no_pending_loss_and_what_a_pickle_would_be_made_of_neither():
    model, adapters = two_layers(method := settings(**LOSSES))
    model(randn(N, D_IN))
    assert not any("pending" in key or "load" in key for key in model.state_dict())
    assert adapters["0"].pending.values
    assert not copy.deepcopy(adapters["0"]).pending.values
    make, arguments = adapters["0"].pending.__reduce__()  # what pickle writes of it
    assert not arguments
    assert not make().values
    assert method.penalty(adapters) is not None


def test_no_graph_outlives_its_step():
    model, adapters = two_layers(method := settings(**LOSSES))
    seen = []

    def watch(module, args):
        seen.append(weakref.ref(args[0]))

    model[2].base.register_forward_pre_hook(watch)
    for _ in range(2):
        y = checkpoint(model, randn(N, D_IN), use_reentrant=False)
        (y.sum() + method.penalty(adapters)).backward()
        del y
    gc.collect()
    assert seen
    assert all(ref() is None for ref in seen)


def test_reentrant_checkpointing_is_refused_where_losses_are_asked_for():
    model, adapters = two_layers(method := settings(**LOSSES))
    checkpoint(model, randn(N, D_IN).requires_grad_(), use_reentrant=True)
    with pytest.raises(AdapterStateError, match=r"gradients off, as reentrant .* Use use_reentrant=False"):
        method.penalty(adapters)


# Dynamo itself instantiates autograd.Function when it traces one, which torch warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_compiled_training_has_the_same_penalty_load_and_gradients():
    results = []
    for compiled in (False, True):
        model, adapter = adapted(method := settings(**LOSSES))
        torch._dynamo.reset()
        run = torch.compile(model.train(), fullgraph=True, backend="aot_eager") if compiled else model.train()
        try:
            for seed in range(3):
                y = run(randn(N, D_IN, seed=seed))
                penalty = method.penalty({"0": adapter})
                (y.square().mean() + penalty).backward()
        finally:
            torch._dynamo.reset()
        results.append([penalty.detach(), adapter.load.take(), *(p.grad for p in adapter.parameters())])
    for plain, other in zip(*results, strict=True):
        close(plain, other, 1e-10)


# -- statistics --------------------------------------------------------------------------------------------------------


def test_statistics_at_balance_and_at_the_other_end():
    even = load_statistics(torch.full((4,), 3.0))
    assert [round(float(even[name]), 6) for name in ("max_over_mean", "entropy", "dead")] == [1.0, 1.0, 0.0]
    one = load_statistics(torch.tensor([5.0, 0.0, 0.0, 0.0]))
    assert [float(one[name]) for name in ("max_over_mean", "entropy", "dead")] == [4.0, 0.0, 0.75]
    uneven = load_statistics(torch.tensor([2.0, 1.0, 1.0, 0.0]))
    assert float(uneven["entropy"]) == pytest.approx(1.5 / 2)  # bits over two bits
    single = load_statistics(torch.tensor([7.0]))
    assert [float(single[name]) for name in ("max_over_mean", "entropy", "dead")] == [1.0, 0.0, 0.0]


def test_load_is_counted_in_backward_and_in_training_only():
    model, adapter = adapted()
    x = randn(9, D_IN)
    expected = (gates(router_logits(x, adapter.router), K) > 0).sum(0).double()
    y = model.train()(x)
    assert adapter.load.sum is None
    y.sum().backward()
    close(adapter.load.sum, expected)
    assert adapter.load.count == 9
    assert float(adapter.load.take().sum()) == pytest.approx(K)


class Routed(Plain):
    """Counts selected experts by hand in each forward, and keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.picks, self.logged = [], []

    def on_train_start(self):
        def count(layer, args):
            self.picks.append((args[0] @ layer.adapter("default").router.T).topk(2).indices.flatten().tolist())

        self.used.register_forward_pre_hook(count)

    def log_dict(self, values, **options):
        self.logged.append((self.trainer.global_step, {name: float(value) for name, value in values.items()}))
        super().log_dict(values, **options)


def test_statistics_are_logged_once_a_step_over_the_window(tmp_path, capsys):
    module = Routed()
    method = MoELoRA(experts=3, top_k=2, rank=2, balance_loss=0.01)
    callbacks = [InjectAdapters(method, ["used"], also_train=["head"], seed=0)]
    run = fit(module, tmp_path, callbacks, accumulate_grad_batches=2, max_steps=3)
    assert sum(isinstance(callback, RouterStatistics) for callback in run.callbacks) == 1
    assert [step for step, _ in module.logged] == [1, 2, 3]
    for step, logged in module.logged:
        picks = [pick for batch in module.picks[2 * step - 2 : 2 * step] for pick in batch]
        load = [picks.count(i) for i in range(3)]
        assert logged["router_max_over_mean"] == pytest.approx(3 * max(load) / sum(load))
        assert logged["router_dead"] == pytest.approx(load.count(0) / 3)
    assert set(run.callback_metrics) >= {"router_max_over_mean", "router_entropy", "router_dead"}
    assert "RouterStatistics: acts on 1 adapter (used)" in capsys.readouterr().out


def test_statistics_need_a_router(tmp_path):
    from ll_lora import LoRA

    with pytest.raises(NoEffectError, match=r"RouterStatistics found nothing to act on: .* 1 trainable adapters, none"):
        fit(Plain(), tmp_path, [InjectAdapters(LoRA(rank=2), ["used"], also_train=["head"]), RouterStatistics()])


class TwoProcesses:
    """A trainer of two processes that always observe the same, and its strategy."""

    world_size, global_step = 2, 1

    @property
    def strategy(self):
        return self

    def reduce(self, tensor, reduce_op):
        assert reduce_op == "sum"
        return 2 * tensor


def test_processes_add_up_and_meet_even_where_one_layer_saw_nothing():
    callback = RouterStatistics()
    callback._statistics, callback._experts = {"a": RunningSum(), "b": RunningSum()}, {"a": 3, "b": 2}
    callback._statistics["a"].add(torch.tensor([3.0, 1.0, 0.0]), 2)
    one, two = callback._take(TwoProcesses(), torch.device("cpu"))
    assert (one.tolist(), two.tolist()) == ([6.0, 2.0, 0.0], [0.0, 0.0])
    assert callback._statistics["a"].sum is None


def test_a_real_run_trains_router_and_experts_under_the_guard(tmp_path):
    folder = encoder_folder(tmp_path / "model")
    method = settings(rank=2, experts=3, top_k=2, balance_loss=0.01, z_loss=0.001, router_lr_ratio=1.0)
    module = classification(folder, method, gradient_checkpointing=True)
    run = trainer(tmp_path, max_steps=5, accumulate_grad_batches=2, gradient_clip_val=1.0)
    run.fit(module, labelled_data(folder))
    guard = next(callback for callback in run.callbacks if isinstance(callback, TrainingGuard))
    moved = {name: size for name, size in guard.changed().items() if ".adapters." in name}
    assert len(moved) == 3 * 4
    assert all(size > 0 for size in moved.values())
    assert 0 < float(run.callback_metrics["penalty"]) < 1
    assert 1 <= float(run.callback_metrics["router_max_over_mean"]) <= 1.5
    for adapter in module.adapters().values():
        assert adapter.load.sum is None
        assert not adapter.pending.values


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 0}, r"MoELoRA.experts is 0; it must be at least 1"),
        ({"top_k": 5}, r"MoELoRA.top_k is 5; it must lie between 1 and experts, which is 4"),
        ({"top_k": 0}, r"MoELoRA.top_k is 0; it must lie between 1 and experts"),
        ({"top_k": 1}, r"MoELoRA.top_k is 1; a single gate is always 1.* Nearest: top_k=2, or balance_loss=0.01"),
        ({"gate_exponent": 1.5}, r"MoELoRA.gate_exponent is 1.5; it must lie in \[0, 1\]"),
        ({"balance_loss": -1.0}, r"MoELoRA.balance_loss is -1.0; it must be at least 0"),
        ({"z_loss": -1.0}, r"MoELoRA.z_loss is -1.0; it must be at least 0"),
        ({"router_lr_ratio": 0.0}, r"MoELoRA.router_lr_ratio is 0.0; it must be above 0"),
        ({"router_clip": 0.0}, r"MoELoRA.router_clip is 0.0; it must be above 0, or null"),
        ({"rank": 0}, r"MoELoRA.rank is 0; it must be at least 1"),
        ({"dropout": 1.0}, r"MoELoRA.dropout is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_settings_outside_their_rules(fields, message):
    with pytest.raises(SettingsError, match=message):
        settings(**fields)


def test_layers_without_one_vector_a_token_are_refused():
    for layer, kind in ((nn.Embedding(9, 4), "embedding"), (nn.Conv1d(4, 4, 3), "conv")):
        with pytest.raises(SettingsError, match=f"which a {kind} layer does not have .* takes linear layers"):
            settings().build(core_base_layer(layer))


def test_printing_a_model_shows_the_sizes():
    adapter = settings().build(core_base_layer(nn.Linear(6, 5)))
    assert isinstance(adapter, MoELoRAAdapter)
    assert repr(adapter) == "MoELoRAAdapter(experts=4, top_k=2, rank=2, gate_exponent=0.5)"


def test_the_default_optimizer_is_another_plugins_and_is_missed_by_name():
    model = nn.Sequential(nn.Linear(6, 5))
    inject(model, MoELoRA(experts=2, top_k=2, rank=1), ["0"], also_train=(), seed=0)
    assert type(build_optimizer(model, None)).__name__ == "RiemannianAdamW"
    plugins.load(blocked=["ll_optimizers"])
    try:
        with pytest.raises(PluginError, match=r"MoELoRA trains with RiemannianAdamW .*no:ll_optimizers"):
            build_optimizer(model, None)
        assert isinstance(build_optimizer(model, torch.optim.SGD), torch.optim.SGD)  # a given one needs no default
    finally:
        plugins.load()
