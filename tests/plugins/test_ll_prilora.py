"""PRILoRA: the contract, ranks by depth, and pruning against a dense float64 reference."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from resuming import SaveAt, assert_equal_runs, run
from torch import nn
from toy_runs import classification, encoder_folder, labelled_data

from ll_lora import LoRA
from ll_prilora import PRILoRA
from ll_prilora.method import rank_at
from lora_lightning.adapters.layers.kinds import core_base_layer
from lora_lightning.errors import NoEffectError, ResumeError, SettingsError
from lora_lightning.injection.inject import inject
from lora_lightning.injection.records import adapters_named, records, trainable_adapters
from lora_lightning.models.meta import expect_values
from lora_lightning.testing import BASE_KINDS, MethodContract, tiny_encoder
from lora_lightning.testing.toy_models import LAYERS


@pytest.mark.slow  # its layers are those of plain pairs
class TestPRILoRA(MethodContract):
    method = PRILoRA(rank=2, alpha=4.0)
    base_kinds = tuple(kind for kind in BASE_KINDS if not kind.startswith("Experts"))
    repeated = ("test_compiles",)


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "ramp", "count"), [(8, 0.5, 12), (8, 0.5, 24), (5, 0.3, 7), (4, 0.0, 6), (6, 0.9, 1)])
def test_ranks_rise_from_first_to_last_and_keep_the_budget(rank, ramp, count):
    ranks = [rank_at(rank, ramp, number, count) for number in range(count)]
    assert ranks == sorted(ranks)
    if count > 1:
        first, last = rank * (1 - ramp), rank * (1 + ramp)
        assert (abs(ranks[0] - first), abs(ranks[-1] - last)) <= (0.5, 0.5)
        exact = [first + (last - first) * number / (count - 1) for number in range(count)]
        assert all(abs(rank - own) <= 0.5 + 1e-6 for rank, own in zip(ranks, exact, strict=True))
        assert abs(sum(ranks) - count * (first + last) / 2) <= count / 2
    else:
        assert ranks == [rank]


def test_the_papers_ranks():
    ranks = [rank_at(8, 0.5, number, 12) for number in range(12)]
    assert (ranks[0], ranks[-1], min(ranks), max(ranks)) == (4, 12, 4, 12)


@pytest.mark.parametrize(("scaling_by", "scalings"), [("rank", [4.0, 8 / 6]), ("mean", [2.0, 2.0])])
def test_layers_of_a_block_share_rank_and_scaling(scaling_by, scalings):
    model = tiny_encoder()
    inject(model, PRILoRA(rank=4, alpha=8.0, scaling_by=scaling_by), seed=0)
    for path, adapter in adapters_named(model, "default").items():
        block = int(path.split("layer.")[1][0])
        assert adapter.rank == (2, 6)[block], path
        assert adapter.scaling == pytest.approx(scalings[block])
    assert "default" in records(model)


def test_a_model_that_is_only_measured_has_these_ranks_too():
    with torch.device("meta"):
        model = expect_values(tiny_encoder())
    inject(model, PRILoRA(rank=4, alpha=8.0), ["query"], also_train=(), seed=0)
    assert [adapter.rank for adapter in adapters_named(model, "default").values()] == [2, 6]


def test_stacked_experts_are_refused():
    with pytest.raises(SettingsError, match=r"stacked experts take their update as a weight, .* exclude them"):
        PRILoRA(rank=2).build(core_base_layer(LAYERS["Experts"][0]()))


# -- pruning -----------------------------------------------------------------------------------------------------------


class Reference:
    """y = W x + s B A x on squared loss with plain SGD; averaged norms and events, all in float64 numpy."""

    def __init__(self, weight, A, B, scaling, lr, rho, every, beta, scope):
        self.W, self.A, self.B, self.s, self.lr = weight, A.copy(), B.copy(), scaling, lr
        self.rho, self.every, self.beta, self.scope = rho, every, beta, scope
        self.norms, self.t, self.importance = np.zeros(A.shape[1]), 0, None

    def step(self, x, y):
        self.t += 1
        error = x @ (self.W + self.s * self.B @ self.A).T - y
        dW = (2 * error / error.size).T @ x
        dA, dB = self.s * self.B.T @ dW, self.s * dW @ self.A.T
        self.A -= self.lr * dA
        self.B -= self.lr * dB
        self.norms = self.beta * self.norms + (1 - self.beta) * np.linalg.norm(x, axis=0) / np.sqrt(len(x))
        if self.t % self.every:
            return
        importance = np.abs(self.A) * self.norms
        rows = importance if self.scope == "row" else importance.reshape(1, -1)
        flat = self.A.reshape(rows.shape)
        for row, own in zip(rows, flat, strict=True):
            own[np.argsort(row)[: int(self.rho * len(row))]] = 0.0


class Loop:
    """The same with our adapter and callback, driven by hand at the callback's moments."""

    def __init__(self, seed=0, lr=0.3, d_in=12, d_out=9, resumed=None, **settings):
        torch.manual_seed(seed)
        self.method = PRILoRA(**{"rank": 3, "alpha": 6.0, "every_n_steps": 4, **settings})
        self.model = nn.Sequential(nn.Linear(d_in, d_out, dtype=torch.float64))
        inject(self.model, self.method, seed=seed)
        (self.path, self.adapter), *_ = trainable_adapters(self.model).items()
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=lr)
        self.schedule = next(iter(self.method.callbacks()), None)
        self.t = 0
        if self.schedule is not None:
            self.schedule.module = SimpleNamespace(device=torch.device("cpu"))
            self.schedule.trainer = SimpleNamespace(global_rank=0)
            if resumed is not None:
                self.schedule.load_state_dict(resumed)
            self.schedule.on_start(20, trainable_adapters(self.model))

    def micro(self, x, y, share=1):
        (nn.functional.mse_loss(self.model(x), y) / share).backward()

    def end(self):
        self.t += 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            with torch.no_grad():
                self.schedule.on_stepped(self.t, trainable_adapters(self.model))

    def step(self, x, y, micro_batches=1):
        for part, target in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            self.micro(part, target, micro_batches)
        self.end()

    @property
    def norms(self):
        return next(iter(self.schedule.norms.values()))


def data(steps=14, n=8):
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(n, 12, generator=generator, dtype=torch.float64) * torch.linspace(
            0.2, 3, 12, dtype=torch.float64
        )
        yield x, torch.randn(n, 9, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_training_equals_a_dense_float64_reference(scope):
    loop = Loop(scope=scope, beta=0.7, sparsity=0.45)
    layer, adapter = loop.model[0].base, loop.adapter
    factors = [p.detach().numpy() for p in (layer.weight, adapter.lora_A, adapter.lora_B)]
    dense = Reference(*factors, 2.0, 0.3, 0.45, 4, 0.7, scope)
    for x, y in data():
        loop.step(x, y)
        dense.step(x.numpy(), y.numpy() - layer.bias.detach().numpy())
        np.testing.assert_allclose(adapter.lora_A.detach(), dense.A, atol=1e-12)
        np.testing.assert_allclose(adapter.lora_B.detach(), dense.B, atol=1e-12)
        np.testing.assert_allclose(loop.norms, dense.norms, rtol=1e-6)  # kept in float32


def test_an_event_zeroes_the_least_of_each_row_and_they_grow_back():
    loop = Loop(sparsity=0.5, every_n_steps=4)
    steps = list(data())
    for x, y in steps[:3]:
        loop.step(x, y)
    assert (loop.adapter.lora_A != 0).all()
    loop.step(*steps[3])
    assert (loop.adapter.lora_A == 0).sum(1).tolist() == [6, 6, 6]
    zeros = loop.adapter.lora_A == 0
    assert loop.method.report(adapters_named(loop.model, "default"))["zeros_of_A"] == 0.5
    loop.step(*steps[4])
    assert (loop.adapter.lora_A[zeros] != 0).all()


def test_without_pruning_and_ramp_it_is_lora_bit_for_bit():
    own, plain = Loop(sparsity=0.0, ramp=0.0), Loop(sparsity=0.0, ramp=0.0)
    plain.model = nn.Sequential(nn.Linear(12, 9, dtype=torch.float64))
    plain.model.load_state_dict({key: own.model.state_dict()[f"0.base.{key[2:]}"] for key in ("0.weight", "0.bias")})
    inject(plain.model, LoRA(rank=3, alpha=6.0), seed=0)
    plain.optimizer = torch.optim.SGD([p for p in plain.model.parameters() if p.requires_grad], lr=0.3)
    assert own.schedule is None
    for x, y in data():
        own.step(x, y)
        plain.step(x, y)
    for name in ("lora_A", "lora_B"):
        key = f"0.adapters.default.{name}"
        assert torch.equal(own.model.state_dict()[key], plain.model.state_dict()[key])


def test_norms_are_the_average_over_two_batches_and_evaluation_leaves_them():
    loop = Loop(beta=0.9)
    (x, y), (u, v) = data(2)
    loop.step(x, y)
    loop.model.eval()
    loop.model(100 * x)
    loop.model.train()
    loop.step(u, v)
    rms = [z.square().mean(0).sqrt() for z in (x, u)]
    torch.testing.assert_close(loop.norms.double(), 0.9 * 0.1 * rms[0] + 0.1 * rms[1], rtol=1e-6, atol=0)


def test_two_half_batches_and_a_recomputed_forward_equal_one_batch():
    whole, halves, again = Loop(), Loop(), Loop()
    for x, y in data():
        whole.step(x, y)
        halves.step(x, y, micro_batches=2)
        again.model(x)  # as a recomputed forward does
        again.step(x, y)
    for other in (halves, again):
        torch.testing.assert_close(other.norms, whole.norms, rtol=1e-6, atol=0)
        assert torch.equal(other.adapter.lora_A == 0, whole.adapter.lora_A == 0)


def test_a_step_that_a_scaler_skipped_leaves_no_inputs():
    loop, plain = Loop(), Loop()
    (x, _), (u, v) = data(2)
    loop.model(x * torch.inf)
    loop.schedule.on_skipped(1)
    loop.step(u, v)
    plain.step(u, v)
    assert torch.equal(loop.norms, plain.norms)


def test_a_layer_that_no_input_reached_is_not_pruned():
    loop = Loop(every_n_steps=1)
    loop.schedule.on_stepped(1, trainable_adapters(loop.model))
    assert (loop.adapter.lora_A != 0).all()


def test_a_save_inside_an_accumulation_window_holds_its_inputs():
    straight, steps = Loop(), list(data())
    for x, y in steps[:5]:
        straight.step(x, y)
    x, y = steps[5]
    straight.micro(x[:4], y[:4], 2)
    state = torch.load(_saved(straight.schedule.state_dict()), weights_only=True)
    resumed = Loop(seed=5, resumed=state)
    resumed.micro(x[4:], y[4:], 2)
    straight.micro(x[4:], y[4:], 2)
    straight.end(), resumed.end()
    assert torch.equal(resumed.norms, straight.norms)


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_a_checkpoint_without_an_adapters_norms_is_refused():
    state = Loop().schedule.state_dict()
    state["norms"] = {}
    with pytest.raises(ResumeError, match=r"holds no averaged norms of the inputs of 0.adapters.default"):
        Loop(resumed=state)


def test_beside_another_method_there_is_nothing_to_act_on():
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoRA(rank=2))
    (schedule,) = PRILoRA().callbacks()
    with pytest.raises(NoEffectError, match=r"InputNormPruning found nothing to act on: .* squares"):
        schedule.select(trainable_adapters(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ramp": 1.0}, r"PRILoRA.ramp is 1.0; it must lie in \[0, 1\)"),
        ({"sparsity": 1.0}, r"PRILoRA.sparsity is 1.0; it must lie in \[0, 1\)"),
        ({"every_n_steps": 0}, r"PRILoRA.every_n_steps is 0; it must be at least 1"),
        ({"beta": -0.1}, r"PRILoRA.beta is -0.1; it must lie in \[0, 1\)"),
        ({"scope": "rows"}, r'PRILoRA.scope is "rows". Did you mean "row"'),
        ({"rank": 0}, r"PRILoRA.rank is 0; it must be at least 1"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        PRILoRA(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_run_resumes_exactly_at_any_step(step, tmp_path):
    folder = encoder_folder(tmp_path / "model")
    saved, method = tmp_path / "saved.ckpt", PRILoRA(rank=4, every_n_steps=4)
    inside = {"accumulate_grad_batches": 2, "max_steps": 8}

    def at(trainer, batch_idx):
        return trainer.global_step == step and (batch_idx + 1) % 2 == 1  # in the middle of a window

    one = run(classification(folder, method), labelled_data(folder), tmp_path / "a", [SaveAt(saved, at)], **inside)
    two = run(classification(folder, method), labelled_data(folder), tmp_path / "b", checkpoint=saved, seed=9, **inside)
    assert_equal_runs(one, two)
    assert any((value == 0).any() for key, value in one["state"].items() if key.endswith("lora_A"))


@pytest.mark.slow
def test_recomputed_activations_prune_the_same_entries(tmp_path):
    folder = encoder_folder(tmp_path / "model", dropout=0.0)
    states = []
    for recompute in (False, True):
        own = classification(
            folder, PRILoRA(rank=4, every_n_steps=2), gradient_checkpointing=recompute, dtype="float64"
        )
        states.append(run(own, labelled_data(folder), tmp_path, max_steps=5)["state"])
    assert all(torch.allclose(value, states[1][key], atol=1e-12) for key, value in states[0].items())
