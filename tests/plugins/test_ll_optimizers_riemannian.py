"""Riemannian SGD and AdamW: dense float64 references, every stated invariance, and behaviour inside a training loop."""

from __future__ import annotations

import copy

import pytest
import torch
from factor_problem import Problem, bound, invertible, projections, run, saved
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn
from toy_runs import classification, encoder_folder, labelled_data, trainer

from ll_dora import DoRA
from ll_lora import LoRA
from ll_optimizers.preconditioner import precondition
from ll_optimizers.riemannian import RiemannianAdamW, RiemannianSGD
from ll_riemannian_moe import MoELoRA
from ll_rose import RoseLoRA
from lora_lightning import inject
from lora_lightning.errors import SettingsError
from lora_lightning.optim.groups import build_optimizer, factor_pairs
from lora_lightning.optim.wrapper import OptimizerWrapper
from lora_lightning.training.run_report import RunReport
from lora_lightning.training.trainer_checkpoints import AtomicCheckpoints

BOTH = [RiemannianSGD, RiemannianAdamW]


# -- dense references --------------------------------------------------------------------------------------------------


class Reference:
    """One pair, explicit inverses, written from the equations."""

    def __init__(self, problem, lr, damping, order, adam, corrected=True, wd=0.0, divide=False, late=False):
        self.p, self.A, self.B = problem, problem.A.detach().clone(), problem.B.detach().clone()
        self.lr, self.damping, self.order, self.adam, self.corrected, self.wd = lr, damping, order, adam, corrected, wd
        self.divide, self.late = divide, late
        self.m = {"A": 0.0, "B": 0.0}
        self.v = {"A": 0.0, "B": 0.0}
        self.t = 0

    def move(self, side, d):
        if self.divide:
            d = d / self.p.scaling**2
        if self.adam:
            self.m[side] = 0.9 * self.m[side] + 0.1 * d
            self.v[side] = 0.999 * self.v[side] + 0.001 * d * d
            c1, c2 = (1 - 0.9**self.t, 1 - 0.999**self.t) if self.corrected else (1.0, 1.0)
            if self.late:  # as transformers' AdamW did: eps is added first, and corrected with the root
                return -self.lr * c2**0.5 / c1 * self.m[side] / (self.v[side].sqrt() + 1e-6)
            d = (self.m[side] / c1) / ((self.v[side] / c2).sqrt() + 1e-6)
        return -self.lr * d

    def step(self):
        self.t += 1
        s, ridge = self.p.scaling, self.damping * torch.eye(self.A.shape[0], dtype=self.A.dtype)
        G = self.p.weights * (s * self.B @ self.A - self.p.target)
        gA, gB = s * self.B.T @ G, s * G @ self.A.T
        A = self.A
        self.A = self.moved("A", A, torch.linalg.inv(self.B.T @ self.B + ridge) @ gA)
        seen = self.A if self.order == "gauss_seidel" else A
        dB = gB @ torch.linalg.inv(seen @ seen.T + ridge)
        self.B = self.moved("B", self.B, dB)

    def moved(self, side, factor, d):
        decay = 1 - self.lr * self.wd
        return decay * (factor + self.move(side, d)) if self.late else decay * factor + self.move(side, d)


@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
@pytest.mark.parametrize(
    ("kind", "settings", "reference"),
    [
        (RiemannianSGD, {"lr": 0.02}, {}),
        (RiemannianSGD, {"lr": 0.02, "divide_by_scaling_sq": True, "weight_decay": 0.3}, {"divide": True, "wd": 0.3}),
        (RiemannianAdamW, {"lr": 0.01}, {}),
        (RiemannianAdamW, {"lr": 0.01, "bias_correction": False}, {"corrected": False}),
        (RiemannianAdamW, {"lr": 0.01, "weight_decay": 0.5}, {"wd": 0.5}),
        (
            RiemannianAdamW,
            {"lr": 0.01, "weight_decay": 0.5, "adam_form": "transformers"},
            {"wd": 0.5, "late": True},
        ),
    ],
)
def test_training_equals_a_dense_float64_reference(kind, settings, reference, order):
    problem = Problem()
    dense = Reference(problem, settings["lr"], 1e-2, order, kind is RiemannianAdamW, **reference)
    optimizer = bound(kind, problem, damping=1e-2, order=order, **settings)
    for _ in range(6):
        run(optimizer, 1, problem)
        dense.step()
        torch.testing.assert_close(problem.A.detach(), dense.A, rtol=0, atol=1e-11)
        torch.testing.assert_close(problem.B.detach(), dense.B, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_batch_equals_a_loop_over_pairs_and_experts(dtype):
    shapes = [{"r": 3}, {"r": 3, "seed": 1}, {"r": 2, "d_in": 9, "seed": 2}, {"r": 3, "lead": (4,), "seed": 3}]
    problems = [Problem(dtype=dtype, **shape) for shape in shapes]
    expected = []
    for problem in problems:
        problem.backward()
        a, b = problem.A.detach().double(), problem.B.detach().double()
        ridge = 1e-3 * torch.eye(a.shape[-2], dtype=torch.float64)
        for index in [()] if a.dim() == 2 else [(i,) for i in range(a.shape[0])]:
            dA = torch.linalg.inv(b[index].T @ b[index] + ridge) @ problem.A.grad[index].double()
            dB = problem.B.grad[index].double() @ torch.linalg.inv(a[index] @ a[index].T + ridge)
            expected.append((a[index] - 0.1 * dA, b[index] - 0.1 * dB))
    bound(RiemannianSGD, *problems, lr=0.1, damping=1e-3).step()
    found = [
        (problem.A[index], problem.B[index])
        for problem in problems
        for index in ([()] if problem.A.dim() == 2 else [(i,) for i in range(problem.A.shape[0])])
    ]
    for (a, b), (dense_a, dense_b) in zip(found, expected, strict=True):
        torch.testing.assert_close(a.detach().double(), dense_a, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(b.detach().double(), dense_b, rtol=1e-6, atol=1e-6)


# -- the preconditioner's invariants -----------------------------------------------------------------------------------


def products(kind, Q, **settings):
    """Distance of the weights after four steps from (A, B) and from (Q A, B Q^-1)."""
    one = Problem()
    other = one.turned(Q)
    for problem in (one, other):
        run(bound(kind, problem, lr=0.02, **settings), 4, problem)
    return float((one.weight() - other.weight()).detach().abs().max())


def test_without_damping_the_product_does_not_depend_on_the_factorisation():
    assert products(RiemannianSGD, invertible(3), damping=0.0) < 1e-12


def test_with_damping_only_orthogonal_changes_leave_the_product():
    orthogonal = torch.linalg.qr(invertible(3))[0]
    assert products(RiemannianSGD, orthogonal, damping=0.1) < 1e-12
    assert products(RiemannianSGD, invertible(3), damping=0.1) > 1e-5


def test_adam_depends_on_the_factorisation():
    assert products(RiemannianAdamW, torch.linalg.qr(invertible(3))[0], damping=0.0) > 1e-5


def test_each_expert_is_invariant_by_itself():
    one = Problem(lead=(3,))
    other = one.turned(torch.stack([invertible(3, seed) for seed in range(3)]))
    for problem in (one, other):
        run(bound(RiemannianSGD, problem, lr=0.02, damping=0.0), 3, problem)
    torch.testing.assert_close(one.weight(), other.weight(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("divide", [False, True])
def test_a_small_step_moves_the_weight_by_both_projections_of_the_full_gradient(divide):
    problem = Problem()
    (P_B, P_A), G, before, lr = projections(problem), problem.G(), problem.weight().detach(), 1e-7
    run(bound(RiemannianSGD, problem, lr=lr, damping=0.0, divide_by_scaling_sq=divide), 1, problem)
    expected = -lr * (1 if divide else problem.scaling**2) * (P_B @ G + G @ P_A)
    error = (problem.weight().detach() - before - expected).norm() / expected.norm()
    assert float(error) < 1e-6


def test_a_large_damping_gives_the_plain_gradient():
    problem = Problem()
    problem.backward()
    A, B = problem.A.detach(), problem.B.detach()
    dA, dB = precondition(problem.A.grad, problem.B.grad, A, B, 1e12)
    torch.testing.assert_close(1e12 * dA, problem.A.grad, rtol=1e-9, atol=0)
    torch.testing.assert_close(1e12 * dB, problem.B.grad, rtol=1e-9, atol=0)
    plain = copy.deepcopy(problem)
    run(bound(RiemannianSGD, problem, lr=0.01 * 1e12, damping=1e12), 4, problem)
    run_plain = torch.optim.SGD(plain.params, lr=0.01)
    for _ in range(4):
        plain.backward()
        run_plain.step()
    torch.testing.assert_close(problem.weight(), plain.weight(), rtol=1e-8, atol=1e-8)


def test_orthonormal_columns_of_the_partner_leave_the_gradient():
    problem = Problem()
    problem.backward()
    B = torch.linalg.qr(problem.B.detach())[0]
    dA, _ = precondition(problem.A.grad, problem.B.grad, problem.A.detach(), B, 0.0)
    torch.testing.assert_close(dA, problem.A.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("damping", [1e-6, 1e-4, 1e-2])
def test_a_gradient_grows_at_most_by_half_the_inverse_root_of_the_damping(damping):
    D = torch.randn(5, 7, dtype=torch.float64)
    D /= torch.linalg.matrix_norm(D, 2)
    A = torch.randn(3, 7, dtype=torch.float64)
    for size in (1e-6, damping**0.5, 1.0):
        B = size * torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64))[0]
        dA, _ = precondition(B.T @ D, D @ A.T, A, B, damping)
        assert float(torch.linalg.matrix_norm(dA, 2)) <= 0.5 / damping**0.5 * (1 + 1e-9)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_zero_only_B_moves_and_all_is_finite(kind, dtype):
    problem = Problem(zero_B=True, dtype=dtype)
    A = problem.A.detach().clone()
    optimizer = bound(kind, problem, lr=1e-3, damping=1e-6)
    run(optimizer, 1, problem)
    assert torch.equal(problem.A, A)
    assert problem.B.any()
    run(optimizer, 3, problem)
    assert not torch.equal(problem.A, A)
    assert torch.isfinite(torch.cat([p.detach().flatten() for p in problem.params])).all()


@pytest.mark.parametrize("kind", BOTH)
def test_a_permutation_of_experts_commutes_with_training(kind):
    one = Problem(lead=(4,))
    order = torch.tensor([2, 0, 3, 1])
    optimizer = bound(kind, one, lr=0.01)
    run(optimizer, 2, one)
    other = copy.deepcopy(one)
    for name in ("A", "B", "target", "weights"):
        setattr(other, name, type(getattr(one, name))(getattr(one, name).detach()[order]))
    other.pair = type(one.pair)("p", other.A, other.B, one.scaling)
    state = saved(optimizer)
    for tensors in state["state"].values():
        tensors |= {name: value[order] for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    again = bound(kind, other, lr=0.01)
    again.load_state_dict(state)
    run(optimizer, 2, one)
    run(again, 2, other)
    torch.testing.assert_close(one.weight()[order], other.weight(), rtol=0, atol=1e-13)


def test_an_expert_without_tokens_rests_under_sgd_and_drifts_by_momentum_under_adam():
    for kind, drifts in ((RiemannianSGD, False), (RiemannianAdamW, True)):
        problem = Problem(lead=(2,))
        optimizer = bound(kind, problem, lr=0.01)
        run(optimizer, 1, problem)
        problem.backward()
        for p in problem.params:
            p.grad[1] = 0
        before = problem.A.detach().clone()
        optimizer.step()
        assert not torch.equal(problem.A[0], before[0])
        assert torch.equal(problem.A[1], before[1]) != drifts


def test_a_side_without_gradient_stays_and_the_other_is_preconditioned():
    for kind in BOTH:
        one, other = Problem(), Problem()
        for problem in (one, other):
            problem.backward()
        one.A.grad = None
        A = one.A.detach().clone()
        bound(kind, one, lr=0.01).step()
        bound(kind, other, lr=0.01).step()
        assert torch.equal(one.A, A)
        assert torch.equal(one.B, other.B)


@pytest.mark.parametrize("kind", BOTH)
def test_resume_equals_not_having_stopped_to_the_bit(kind):
    one, stopped = Problem(dtype=torch.float32), Problem(dtype=torch.float32)
    run(bound(kind, one, lr=0.01), 5, one)
    first = bound(kind, stopped, lr=0.01)
    run(first, 2, stopped)
    state = saved(first)
    second = bound(kind, stopped, lr=0.5)
    second.load_state_dict(state)
    run(second, 3, stopped)
    assert torch.equal(one.A, stopped.A)
    assert torch.equal(one.B, stopped.B)


def test_a_singular_partner_is_damped_more_said_once_and_counted():
    problem = Problem(name="layer.0")
    with torch.no_grad():
        problem.B[:, 1] = problem.B[:, 0]
        problem.B[:, 2] = 0
    optimizer = bound(RiemannianSGD, problem, lr=1e-12, damping=0.0)
    with pytest.warns(UserWarning, match='RiemannianSGD: factors of the pair "layer.0" are so near singular'):
        run(optimizer, 1, problem)
    assert optimizer.report() == {"layer.0": 1}
    assert torch.isfinite(problem.A).all()


# -- in models ---------------------------------------------------------------------------------------------------------


def small(method, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    inject(net, method, ["0"], also_train=["2"], seed=0)
    return net


METHODS = [
    LoRA(rank=2),
    LoRA(rank=2, train="B", bias=True),
    RoseLoRA(rank=2),
    DoRA(rank=2),
    MoELoRA(experts=3, top_k=2, rank=2),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("kind", BOTH)
def test_methods_with_pairs_train_and_their_heads_take_the_plain_rule(kind, method):
    net = small(method)
    plain = {RiemannianSGD: torch.optim.SGD, RiemannianAdamW: torch.optim.AdamW}[kind]
    options = {"eps": 1e-6} if kind is RiemannianAdamW else {}
    reference = copy.deepcopy(net)
    x = torch.randn(8, 6)
    optimizer = build_optimizer(net, lambda groups: kind(groups, lr=0.01))
    head = plain(reference[2].parameters(), lr=0.01, weight_decay=0.0, **options)
    before = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    for step in range(2):
        for model in (net, reference):
            model.zero_grad()
            model(x).square().sum().backward()
        optimizer.step()
        if step == 0:
            head.step()
            torch.testing.assert_close(net[2].weight, reference[2].weight)
    moved = {name for name, p in net.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == set(before)


def test_a_bfloat16_base_has_float32_factors_and_is_preconditioned():
    net = small(LoRA(rank=2), torch.bfloat16)
    (pair,) = factor_pairs(net)
    assert pair.lora_A.dtype == torch.float32
    optimizer = build_optimizer(net, lambda groups: RiemannianSGD(groups, lr=1.0, damping=1e-2))
    net(torch.randn(8, 6, dtype=torch.bfloat16)).square().sum().backward()
    _, dB = precondition(*(t.double() for t in (pair.lora_A * 0, pair.lora_B.grad, pair.lora_A, pair.lora_B)), 1e-2)
    before = pair.lora_B.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - pair.lora_B.detach(), dB.detach().float())


def test_two_halves_of_a_batch_make_the_step_of_the_whole():
    whole, halves = small(LoRA(rank=2)).double(), small(LoRA(rank=2)).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    for net, parts in ((whole, (x,)), (halves, x.chunk(2))):
        optimizer = build_optimizer(net, lambda groups: RiemannianAdamW(groups, lr=0.01))
        for _ in range(3):
            optimizer.zero_grad()
            for part in parts:
                (net(part).square().mean() / len(parts)).backward()
            optimizer.step()
    for one, two in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


class SaveAfter(Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint:UserWarning")
def test_in_a_trainer_with_accumulation_clipping_and_resume(tmp_path):
    """Clipping bounds the raw gradient; the step is preconditioned after it."""
    encoder, file = encoder_folder(tmp_path, dropout=0.0), tmp_path / "mid.ckpt"

    def fit(checkpoint=None):
        seed_everything(0, verbose=False)
        module = classification(
            encoder, LoRA(rank=2), optimizer=lambda groups: RiemannianAdamW(groups, lr=1e-3, damping=1e-4)
        )
        options = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2, "max_steps": 4}
        fitted = trainer(tmp_path, [SaveAfter(file, 2)], plugins=[AtomicCheckpoints()], **options)
        fitted.fit(module, datamodule=labelled_data(encoder), ckpt_path=checkpoint, weights_only=True)
        return fitted, module.state_dict()

    whole, state = fit()
    gradients = [p.grad for group in whole.optimizers[0].param_groups for p in group["params"]]
    assert float(torch.nn.utils.get_total_norm(gradients)) <= 0.05 * 1.001
    assert len(whole.optimizers[0].pairs) == 4
    _, resumed = fit(file)
    for name, value in state.items():
        assert torch.equal(value, resumed[name]), name


class Through(OptimizerWrapper):
    def take_step(self):
        self.inner.step()


@pytest.mark.parametrize("wrap", [lambda made: made, lambda made: Through(Through(made))], ids=["bare", "wrapped"])
def test_a_raised_damping_is_said_in_the_summary(tmp_path, capsys, wrap):
    """Without any damping of its own the zero B of the first step needs one, whatever is around the optimizer."""
    encoder = encoder_folder(tmp_path, dropout=0.0)
    module = classification(encoder, LoRA(rank=2), optimizer=lambda g: wrap(RiemannianAdamW(g, lr=1e-3, damping=0.0)))
    report = RunReport(tmp_path)
    with pytest.warns(UserWarning, match="so near singular"):
        trainer(tmp_path, [report], max_steps=4).fit(module, datamodule=labelled_data(encoder))
    assert report.summary["damping_raised"] == {f"{path}.adapters.default": 1 for path in module.adapters()}
    printed = " ".join(capsys.readouterr().out.split())
    assert "damping was raised at 1 step for bert.encoder.layer.0.attention.self.query.adapters.default," in printed
    assert "default, and for 1 pair more" in printed


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (RiemannianSGD, {"damping": -1.0}, r"RiemannianSGD.damping is -1.0; it must be at least 0"),
        (RiemannianSGD, {"order": "seidel"}, r"RiemannianSGD.order is 'seidel'; it takes jacobi, gauss_seidel"),
        (RiemannianAdamW, {"betas": (0.9, 1.0)}, r"RiemannianAdamW.betas is \(0.9, 1.0\); both must lie in \[0, 1\)"),
        (RiemannianAdamW, {"eps": 0.0}, r"RiemannianAdamW.eps is 0.0; it must be above 0"),
        (RiemannianAdamW, {"lr": -1e-3}, r"RiemannianAdamW.lr is -0.001; it must be at least 0"),
        (RiemannianSGD, {"weight_decay": -1.0}, r"RiemannianSGD.weight_decay is -1.0; it must be at least 0"),
    ],
)
def test_settings_outside_their_rules(kind, settings, message):
    with pytest.raises(SettingsError, match=message):
        kind(Problem().params, **settings)
