"""ReLoRA: the contract, its defaults, its rate, and plain training where no merge falls into a run."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from resuming import run
from staged_projects import staged
from toy_runs import classification, encoder_folder, labelled_data

from ll_lora import LoRA
from ll_mora import MoRA
from ll_relora import ReLoRA
from lora_lightning.callbacks import Cascade
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.testing import MethodContract


@pytest.mark.slow  # the adapters of TestLoRA
class TestReLoRA(MethodContract):
    method = ReLoRA(inner=LoRA(rank=2, alpha=4.0), stage_steps=2)
    repeated = ("test_compiles",)


@pytest.mark.slow
class TestReLoRAOfMoRA(MethodContract):
    method = ReLoRA(inner=MoRA(rank=2), stage_steps=2)
    base_kinds = ("Linear",)
    random_start = False
    repeated = ("test_compiles",)
    test_refuses_other_kinds_of_layer = None  # they are in the class of MoRA


def test_its_cascade():
    (cascade,) = ReLoRA(inner=LoRA(), stage_steps=7).callbacks()
    assert isinstance(cascade, Cascade)
    chosen = cascade.blend, cascade.remainder, cascade.moments, cascade.pruned_fraction, cascade.pruned_by
    assert chosen == (1.0, "restart", "prune", 0.999, "random")
    assert (cascade.lr, cascade.rewarm_steps, cascade.lr_floor, cascade.stage_steps) == ("jagged", 100, 0.1, 7)


def test_a_merge_leaves_the_function_and_begins_the_factors_again(tmp_path):
    method = ReLoRA(inner=LoRA(rank=2, alpha=6.0), stage_steps=3, lr="continue", lr_floor=0.0)
    module, before, after = staged(tmp_path, method=method, max_steps=6)
    for step in (3, 6):
        for i, layer in enumerate(module.layers):
            torch.testing.assert_close(after.weights[step][i], before.weights[step][i], rtol=0, atol=1e-12)
            (A0, B0), (A1, B1) = before.factors[step][i], after.factors[step][i]
            assert B0.any()
            assert not B1.any()
            assert not torch.equal(A0, A1)
            assert float(A1.abs().max()) <= 12**-0.5
            assert layer.adapter("default").scaling == 3.0


def test_with_no_merge_inside_the_run_it_is_plain_training(tmp_path):
    method = ReLoRA(inner=LoRA(rank=2), stage_steps=100, lr="continue", lr_floor=0.0)
    _, chained, _ = staged(tmp_path, method=method, max_steps=6)
    _, plain, _ = staged(tmp_path, method=LoRA(rank=2), max_steps=6)
    for step in range(1, 7):
        assert all(torch.equal(*pair) for pair in zip(chained.weights[step], plain.weights[step], strict=True))


def test_the_rate_of_a_run(tmp_path):
    """(w0, w, L, total, floor) = (2, 2, 4, 12, 0.1) with a cosine, at each optimizer step."""
    rates = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    encoder = encoder_folder(tmp_path / "encoder", dropout=0.0)
    method = ReLoRA(inner=LoRA(rank=1), stage_steps=4, rewarm_steps=2)
    module = classification(encoder, method, lr_scheduler=WarmUp(warmup_fraction=1 / 6, decay="cosine"))
    run(module, labelled_data(encoder), tmp_path, [Rates()], max_steps=12)

    def e(s):
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 2) / 10))

    expected = [0, 0.5, e(2), e(3), 0, e(6) / 2, e(6), e(7), 0, e(10) / 2, e(10), e(11)]
    assert rates == pytest.approx([1e-3 * f for f in expected])
