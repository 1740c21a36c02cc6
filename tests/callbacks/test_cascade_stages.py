"""What differs between stages of a cascade: remainders, moments, layers that rest, ranks, the log, the rate."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from projects import loader
from resuming import SaveAt, at_step
from staged_projects import Layers, staged
from torch import nn
from toy_runs import trainer

import lora_lightning as ll
from ll_dora import DoRA
from ll_lora import LoRA
from lora_lightning.adapters.folded import DenseUpdate, FactoredUpdate
from lora_lightning.callbacks import Cascade, ExactResume, InjectAdapters, TrainingGuard
from lora_lightning.errors import SettingsError
from lora_lightning.optim.warmup import StageEnds, WarmUp
from lora_lightning.testing import perturb

# -- what is left of an update -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["both", "B"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_fraction_is_folded_and_the_function_stays(tmp_path, dense, train):
    """W + m s B A with sqrt(1 - m) times each factor, or 1 - m times the one that trains."""
    m, method = 0.3, LoRA(rank=6 if dense else 1, alpha=3.0, train=train)
    cascade = Cascade(stage_steps=3, blend=m, remainder="shrink")
    module, before, after = staged(tmp_path, cascade, method, max_steps=7)
    for step in (3, 6):
        for i, layer in enumerate(module.layers):
            assert isinstance(layer.shifts["default"], DenseUpdate if dense else FactoredUpdate)
            torch.testing.assert_close(after.weights[step][i], before.weights[step][i], rtol=0, atol=1e-12)
            (A0, B0), (A1, B1) = before.factors[step][i], after.factors[step][i]
            sides = (1 - m) ** 0.5 if train == "both" else 1 - m
            torch.testing.assert_close(B1, sides * B0, rtol=0, atol=1e-12)
            torch.testing.assert_close(A1, sides * A0 if train == "both" else A0, rtol=0, atol=1e-12)
    assert cascade.stage == 2  # the last stage is not cut short: what is left of it is in the adapter
    assert module.layers[0].adapter("default").lora_B.any()
    assert cascade.finished(7)


def test_each_factor_may_shrink_by_itself_and_then_the_function_jumps(tmp_path):
    m = 0.4
    cascade = Cascade(stage_steps=3, blend=m, remainder="shrink_each")
    _, before, after = staged(tmp_path, cascade, LoRA(rank=1, alpha=1.0), max_steps=3)
    A, B = before.factors[3][0]
    jump = before.weights[3][0] - after.weights[3][0]
    torch.testing.assert_close(jump, m * (1 - m) * B @ A, rtol=0, atol=1e-12)


def test_pieces_may_weigh_less_from_stage_to_stage(tmp_path):
    d = 0.5
    _, before, after = staged(tmp_path, Cascade(stage_steps=2, blend_decay=d), LoRA(rank=1, alpha=1.0), max_steps=6)
    for k in (1, 2, 3):
        A, B = before.factors[2 * k][0]
        jump = before.weights[2 * k][0] - after.weights[2 * k][0]
        torch.testing.assert_close(jump, (1 - d**k) * B @ A, rtol=0, atol=1e-12)


def test_an_update_that_cannot_shrink_is_refused(tmp_path):
    cascade = Cascade(stage_steps=3, blend=0.5, remainder="shrink")
    with pytest.raises(SettingsError, match=r'remainder is "shrink", but the update of .*DoRAAdapter\) cannot be made'):
        staged(tmp_path, cascade, DoRA(rank=1))


def test_unloading_again_and_again_shrinks_the_update_by_its_power():
    """(1 - m)^(k / 2) a factor, (1 - m)^k the product, and the function as it was."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    ll.inject(model, LoRA(rank=2), ["0"], also_train=(), seed=0)
    layer = model[0]
    adapter = layer.adapter("default")
    perturb(adapter)
    layer.set_folded("default", FactoredUpdate(layer.base_layer))
    weight, A, B = (t.detach().clone() for t in (layer.weight, adapter.lora_A, adapter.lora_B))
    m, k = 0.3, 4
    for _ in range(k):
        layer.fold("default", m)
        assert adapter.shrink(1 - m)
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(adapter.lora_A, (1 - m) ** (k / 2) * A)
    torch.testing.assert_close(adapter.lora_B @ adapter.lora_A, (1 - m) ** k * B @ A)


# -- moments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("by", ["random", "magnitude"])
def test_moments_are_thinned_out(tmp_path, by, apart):
    """A share of each; counts of steps go on; under one mask no first moment stays without its second."""
    share = 0.75
    cascade = Cascade(stage_steps=3, moments="prune", pruned_fraction=share, pruned_by=by, pruned_apart=apart)
    _, before, after = staged(tmp_path, cascade, LoRA(rank=8), max_steps=3)
    zeros = {"exp_avg": [], "exp_avg_sq": []}
    for old, new in zip(chain(*before.moments[3]), chain(*after.moments[3]), strict=True):
        assert old["step"] == new["step"] == 3
        for name, found in zeros.items():
            kept = new[name] != 0
            assert torch.equal(new[name][kept], old[name][kept])
            found += [float((new[name] == 0).double().mean())] * int(bool(old[name].all()))
        if by == "magnitude":  # of the second moment, or of each
            for name in zeros if apart else ["exp_avg_sq"]:
                sizes = old[name].abs().flatten().sort().values
                edge = torch.quantile(sizes.float(), share)
                assert torch.equal(new[name] != 0, old[name].abs().float() > edge)
        if not apart:
            assert not (new["exp_avg"].bool() & ~new["exp_avg_sq"].bool()).any()
    for found in zeros.values():
        assert found
        assert sum(found) / len(found) == pytest.approx(share, abs=0.06)


# -- layers that rest --------------------------------------------------------------------------------------------------


def test_layers_that_are_not_drawn_rest(tmp_path):
    """Their output is that of the merged base layer, they get no gradient, and their moments stay as they are."""

    class Gradients(Callback):
        def __init__(self):
            self.none = {}

        def on_train_batch_end(self, trainer, pl_module, *_):
            layers = [layer.adapter("default") for layer in pl_module.layers]
            self.none[trainer.global_step] = [
                all(not p.grad.any() for p in a.parameters() if p.grad is not None) for a in layers
            ]

    cascade, gradients = Cascade(stage_steps=3, active_layers=2), Gradients()
    extra = [gradients, TrainingGuard()]
    module, before, after = staged(tmp_path, cascade, LoRA(rank=1), extra=extra, max_steps=12)
    drawn = [cascade.active_in(stage) for stage in range(4)]
    assert all(len(paths) == 2 for paths in drawn)
    assert len(set(drawn)) > 1
    for step in range(1, 13):
        active = drawn[(step - 1) // 3]
        for i in range(4):
            rests = f"layers.{i}.adapters.default" not in active
            assert bool(before.factors[step][i][1].any()) != rests
            if rests:
                layer_before = before.weights[step][i]
                assert step == 1 or torch.equal(layer_before, after.weights[step - 1][i])
                assert all(not state for state in before.moments[step][i])
    for i, layer in enumerate(module.layers):
        times = sum(f"layers.{i}.adapters.default" in paths for paths in drawn)
        change = layer.merged_weight("default", torch.float64) - layer.original_weight()
        assert int(torch.linalg.matrix_rank(change, rtol=1e-9)) == times
        assert not layer.adapter("default").resting


def test_layers_are_drawn_evenly_and_those_that_never_were_are_named(tmp_path, capsys):
    cascade = Cascade(stage_steps=3, active_layers=1)
    staged(tmp_path, cascade, LoRA(rank=1), extra=[TrainingGuard()], max_steps=3)
    assert "active_layers is 1: 3 of 4 layers were drawn in none of 1 stages, so they did not train" in (
        capsys.readouterr().out
    )
    counts = [sum(path in cascade.active_in(stage) for stage in range(2000)) for path in sorted(cascade._adapters)]
    assert sum(counts) == 2000
    for count in counts:  # five deviations of a binomial count
        assert abs(count - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75)


def test_more_layers_than_there_are_is_an_error(tmp_path):
    with pytest.raises(SettingsError, match=r"active_layers is 5; 4 layers are adapted, so it must be at most 4"):
        staged(tmp_path, Cascade(stage_steps=3, active_layers=5))


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_later_stages_train_fewer_rank_components(tmp_path):
    cascade = Cascade(stage_steps=2, stage_ranks=[3, 1])
    module, before, after = staged(tmp_path, cascade, LoRA(rank=3, alpha=3.0), max_steps=6)
    start = [layer.original_weight() for layer in module.layers]
    for i, layer in enumerate(module.layers):
        previous = start[i]
        for step, rank in ((2, 3), (4, 1), (6, 1)):
            change = before.weights[step][i] - previous
            assert int(torch.linalg.matrix_rank(change, rtol=1e-8)) == rank
            torch.testing.assert_close(after.weights[step][i], before.weights[step][i], rtol=0, atol=1e-12)
            previous = after.weights[step][i]
        assert layer.adapter("default").scaling == 1.0
        assert layer.low_rank("default")[0].shape[0] == 5


def test_ranks_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(
        SettingsError, match=r"stage_ranks is \[3\]; the adapter of .* has rank 2, so each must be at most"
    ):
        staged(tmp_path, Cascade(stage_steps=3, stage_ranks=[3]))
    with pytest.raises(SettingsError, match=r"rank components of .*DoRAAdapter\) cannot be masked"):
        staged(tmp_path, Cascade(stage_steps=3, stage_ranks=[1]), DoRA(rank=1))


# -- a bounded log -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [(), (3,)])
def test_folded_factors_are_cut_to_the_best_of_a_rank(experts):
    """By Eckart and Young: the discarded singular values, and nothing else, are lost."""

    class Base:
        d_in, d_out, adapter_dtype, device = 9, 7, torch.float64, "cpu"

        def zeros(self, *size):
            return torch.zeros(*experts, *size, dtype=torch.float64)

    update, generator = FactoredUpdate(Base()), torch.Generator().manual_seed(0)
    whole = 0
    for _ in range(4):
        A, B = (torch.randn(*experts, *s, generator=generator, dtype=torch.float64) for s in ((2, 9), (7, 2)))
        update.fold(A, B, 0.5, "outer_step")
        whole = whole + 0.5 * B @ A
    assert update.compress(8) == (0.0, 0.0)
    lost, size = update.compress(3)
    A, B = update.low_rank()
    assert A.shape[-2] == 3
    U, sizes, V = torch.linalg.svd(whole, full_matrices=False)
    best = U[..., :3] * sizes[..., None, :3] @ V[..., :3, :]
    torch.testing.assert_close(B @ A, best, rtol=0, atol=1e-12)
    assert size == pytest.approx(float(whole.norm()))
    assert lost == pytest.approx(float((whole - best).norm()))


def test_the_log_of_a_run_keeps_its_bound_and_says_what_it_loses(tmp_path, capsys):
    cascade = Cascade(stage_steps=2, log_rank=2)
    module, before, after = staged(tmp_path, cascade, LoRA(rank=1, alpha=8.0), max_steps=10)
    worst = 0.0
    for i, layer in enumerate(module.layers):
        assert layer.low_rank("default")[0].shape[0] == 2
        lost = 0.0
        for step in (2, 4, 6, 8, 10):
            lost += float((before.weights[step][i] - after.weights[step][i]).norm())
            whole = before.weights[step][i] - layer.original_weight()
            worst = max(worst, lost / float(whole.norm()) if step > 4 else 0.0)
    assert cascade.metrics()["log_error"] == pytest.approx(worst, rel=1e-6)
    assert "factors of 4 layers were cut to rank 2; at most" in capsys.readouterr().out


def test_the_dense_form_is_taken_where_it_is_smaller_than_the_bounded_log(tmp_path):
    for log_rank, form in ((5, FactoredUpdate), (6, DenseUpdate)):  # of 12 by 12: 24 numbers a rank, 144 dense
        cascade = Cascade(stage_steps=2, log_rank=log_rank)
        module, _, _ = staged(tmp_path, cascade, LoRA(rank=2), max_steps=20)
        assert isinstance(module.layers[0].shifts["default"], form)


# -- the rate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_jagged_rate_is_a_closed_form_of_the_step(decay):
    """(w0, w, L, total, floor) = (3, 2, 5, 20, 0.1), against the definition written out."""
    w0, w, L, total, floor = 3, 2, 5, 20, 0.1

    def e(s):
        done = (s - w0) / (total - w0)
        shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[decay]
        return floor + (1 - floor) * shape

    expected = [0, 1 / 3, 2 / 3, e(3), e(4)]
    for begin in (5, 10, 15):
        expected += [0, e(begin + 2) / 2, e(begin + 2), e(begin + 3), e(begin + 4)]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = WarmUp(warmup_fraction=w0 / total, decay=decay)
    scheduler = warmup.schedule(optimizer, total, StageEnds(L, "jagged", w, floor))
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected)


def test_a_first_warm_up_that_outlasts_the_first_stage_is_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(SettingsError, match=r"warmup_fraction is 0\.5; that is 10 of 20 steps.*so at most 0\.25"):
        WarmUp(warmup_fraction=0.5).schedule(optimizer, 20, StageEnds(5, "jagged", 2))


# -- resume ----------------------------------------------------------------------------------------------------------


RESUMED = {
    "shrink, prune": {"blend": 0.2, "remainder": "shrink", "moments": "prune", "pruned_fraction": 0.5},
    "rest, log": {"active_layers": 2, "log_rank": 2, "moments": "keep"},
    "ranks, magnitude": {"stage_ranks": [2, 1], "moments": "prune", "pruned_by": "magnitude", "pruned_fraction": 0.5},
}


@pytest.mark.parametrize(("length", "step"), [(4, 4), (3, 8)], ids=["end", "inside"])
@pytest.mark.parametrize("name", RESUMED)
def test_resume_inside_a_stage_and_at_its_end(tmp_path, name, length, step):
    """Steps of two batches, epochs of four steps: all tensors and moments are the uninterrupted run's."""
    saved = tmp_path / "saved.ckpt"

    def once(callbacks, **options):
        module = Layers()
        inject = InjectAdapters(LoRA(rank=2), ["0", "1", "2", "3"], also_train=["head"], seed=3, checkpoint="full")
        run = [inject, Cascade(stage_steps=length, **RESUMED[name]), ExactResume(), TrainingGuard(), *callbacks]
        fitted = trainer(tmp_path, run, max_steps=10, accumulate_grad_batches=2)
        fitted.fit(module, loader(), weights_only=True, **options)
        return module, fitted.optimizers[0].state_dict()["state"]

    (straight, state), (resumed, again) = once([SaveAt(saved, at_step(step))]), once([], ckpt_path=saved)
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for index, moments in state.items():
        for key, value in moments.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again[index][key])), (index, key)
    x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = straight.layers(x)
    ll.merge(straight)
    torch.testing.assert_close(straight.layers(x), expected)


def test_a_window_of_two_batches_is_one_of_both(tmp_path):
    """Stages count optimizer steps: accumulated gradients change nothing about where they end."""
    cascade = Cascade(stage_steps=2, active_layers=2)
    _, before, after = staged(tmp_path, cascade, LoRA(rank=1), max_steps=4, accumulate_grad_batches=2)
    assert cascade.stage == 2
    for step in (2, 4):
        for one, other in zip(before.weights[step], after.weights[step], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
