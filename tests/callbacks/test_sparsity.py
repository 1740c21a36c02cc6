"""The sparsity schedule: its settings, what a checkpoint of its steps holds, and former spellings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from projects import Plain, fit
from torch import nn
from torch.utils.data import DataLoader
from toy_runs import trainer

from ll_rose import RoseLoRA
from lora_lightning import callbacks, inject
from lora_lightning.callbacks import InjectAdapters, SparsitySchedule
from lora_lightning.cli.main import main
from lora_lightning.errors import SettingsError
from lora_lightning.methods import SparsityFields, field_names, values_of
from lora_lightning.registry import arguments

OLD = Path(__file__).parents[1] / "old_files"


def test_a_checkpoint_of_a_step_holds_the_pruned_factors(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    method = RoseLoRA(rank=2, sparsity=0.5, start=2, end=4)
    fit(Plain(), tmp_path, [InjectAdapters(method, ["used"]), checkpoint], enable_checkpointing=True, max_steps=5)
    tensors = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["lora_lightning"]["tensors"]
    assert (tensors["used.adapters.default.lora_A"] == 0).sum(1).tolist() == [2, 2]


class Editing(LightningModule):
    """Three requests a pass, one a step, as the released editing code trains: squared loss, plain SGD, float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(12, 9, dtype=torch.float64))

    def training_step(self, batch):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.3)


def released(module, requests, passes, start, final, tau, beta, clamp):
    """The released loop, written from its description: passes from 0, and a strict threshold."""
    adapter = module.net[0].adapter("default")
    W, b = (t.detach().numpy() for t in (module.net[0].base.weight, module.net[0].base.bias))
    A, B = (t.detach().numpy().copy() for t in (adapter.lora_A, adapter.lora_B))
    s, lr, average = adapter.scaling, 0.3, None
    for it in range(passes):
        ramp = min(max((it - start) / (final - start), 0.0), 1.0)
        kept = tau + (1 - tau) * (1 - ramp) ** 3
        for x, y in requests:
            dW = 2 * (x @ (W + s * B @ A).T + b - y).T @ x / y.size
            gradients = s * B.T @ dW, s * dW @ A.T
            scores = np.abs(A * gradients[0]), np.abs(B * gradients[1])
            average = scores if average is None else [beta * a + (1 - beta) * n for a, n in zip(average, scores)]  # noqa: B905
            A, B = A - lr * gradients[0], B - lr * gradients[1]
            if kept < 1:
                A = A * (average[0] >= np.sort(average[0], 1)[:, [int(12 * (1 - kept)) - 1]])
                B = B * (average[1] >= np.sort(average[1], 0)[[int(9 * (1 - kept)) - 1]])
                A, B = A.clip(-clamp, clamp), B.clip(-clamp, clamp)
    return A, B


@pytest.mark.parametrize("rows", [3, 1])
def test_a_clock_of_passes_is_that_of_the_released_editing_code(tmp_path, rows):
    """Its passes count from 0 and ours from 1, so `start` and `end` are one later. Of one request a pass is a step."""
    g = torch.Generator().manual_seed(0)
    requests = [tuple(torch.randn(2, n, generator=g, dtype=torch.float64) for n in (12, 9)) for _ in range(rows)]
    module = Editing()
    clock = "passes" if rows > 1 else "steps"
    method = RoseLoRA(
        rank=3, alpha=6.0, sparsity=0.5, beta=0.8, start=3, end=8,
        keep_rule="official", first_score="gradient", clamp=0.05, clock=clock,
    )  # fmt: skip
    inject(module, method, ["0"], also_train=(), seed=0)
    expected = released(module, [tuple(t.numpy() for t in pair) for pair in requests], 10, 2, 7, 0.5, 0.8, 0.05)
    run = trainer(tmp_path, list(method.callbacks()), max_epochs=10, max_steps=-1)
    run.fit(module, DataLoader(requests, batch_size=None))
    adapter = module.net[0].adapter("default")
    np.testing.assert_allclose(adapter.lora_A.detach(), expected[0], atol=1e-12)
    np.testing.assert_allclose(adapter.lora_B.detach(), expected[1], atol=1e-12)
    assert (expected[0] == 0).any()


def test_fractions_of_passes_and_their_refusal(tmp_path):
    schedule = SparsitySchedule(sparsity=0.5, start=0.2, end=0.5, clock="passes")
    checked = [InjectAdapters(RoseLoRA(rank=2), ["used"]), schedule]
    fit(Plain(), tmp_path, checked, max_epochs=10, max_steps=-1)
    assert (schedule.start_step, schedule.end_step) == (2, 5)
    assert schedule.finished(5 * 8)
    late = SparsitySchedule(sparsity=0.5, start=2, end=12, clock="passes")
    with pytest.raises(SettingsError, match="end is pass 12; the run has 3 passes, so it must be at most 3"):
        fit(Plain(), tmp_path, [InjectAdapters(RoseLoRA(rank=2), ["used"]), late], max_steps=20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"keep_rule": "flor"},
            r"SparsitySchedule.keep_rule is 'flor'; it must be \"floor\" or \"ceil\" or \"official\"",
        ),
        ({"first_score": "one"}, r"SparsitySchedule.first_score is 'one'; it must be \"zero\" or \"gradient\""),
        ({"clamp": -1.0}, r"SparsitySchedule.clamp is -1.0; it must be above 0, or null"),
        ({"sparsity": 1.0}, r"SparsitySchedule.sparsity is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_settings_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        SparsitySchedule(**settings)


def test_the_callback_takes_the_methods_group():
    method = RoseLoRA(sparsity=0.5, beta=0.7, start=2, end=9, keep_rule="ceil", first_score="gradient", clamp=0.1)
    (schedule,) = method.callbacks()
    assert field_names(SparsityFields) == (
        "sparsity", "beta", "start", "end", "keep_rule", "first_score", "clamp", "clock"
    )  # fmt: skip
    assert values_of(schedule, SparsityFields) == values_of(method, SparsityFields)
    assert method.run_wide == field_names(SparsityFields)


def test_the_parser_knows_the_types_of_a_group(capsys):
    """A class that mixes a group with Lightning's types could leave its settings unchecked."""
    for name in ("SparsitySchedule", "Cascade"):
        assert main(["fit", "--trainer.callbacks.help", name]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "Unvalidated" not in shown
        assert all(f"--trainer.callbacks.{field}" in shown for field in arguments(getattr(callbacks, name)))


def test_two_schedules_of_equal_settings_are_two():
    assert SparsitySchedule() != SparsitySchedule()
    assert len({SparsitySchedule(), SparsitySchedule()}) == 2


def test_the_state_of_a_run_of_an_older_version_is_read():
    saved = torch.load(OLD / "runs/rose/002/last.ckpt", weights_only=True)["callbacks"]["SparsitySchedule"]
    schedule = SparsitySchedule(sparsity=0.5)
    schedule.load_state_dict(saved)
    assert schedule._saved_total == 8
    assert schedule._settings() == {**schedule._saved_settings, "clock": "steps"}  # a setting that it did not have
