"""DeepSpeed without DeepSpeed: what it refuses, and what it leaves alone."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import lightning.pytorch.strategies.deepspeed
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy

from lora_lightning.callbacks import Cascade, NoiseInjection, RankPruning, SparsitySchedule
from lora_lightning.cli.main import main
from lora_lightning.errors import SettingsError
from lora_lightning.training.strategies import DeepSpeed
from lora_lightning.training.strategies import deepspeed as zero


def test_deepspeed_that_is_not_there_and_devices_it_does_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"not installed \(pip install deepspeed\); nearest: FSDP2"):
        DeepSpeed()
    config = tmp_path / "config.yaml"
    config.write_text("trainer: {strategy: {class_path: DeepSpeed}}")
    assert main(["fit", "--config", "rose", "--config", str(config)]) == 2
    assert "(pip install deepspeed)" in capsys.readouterr().err.splitlines()[0]
    there = DeepSpeed.__new__(DeepSpeed)
    there.accelerator = CPUAccelerator()
    with pytest.raises(SettingsError, match="CPUAccelerator, and DeepSpeed works on GPUs alone; nearest: FSDP2"):
        there.setup_environment()


@pytest.fixture
def deepspeed(monkeypatch):
    """Ours, as it is where DeepSpeed is installed and the trainer has a GPU; nothing is started."""
    package = SimpleNamespace(utils=SimpleNamespace(logging=SimpleNamespace(logger=logging.getLogger("deepspeed"))))
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    monkeypatch.setattr(zero, "find_spec", lambda name: name)
    monkeypatch.setattr(lightning.pytorch.strategies.deepspeed, "_DEEPSPEED_AVAILABLE", True)
    monkeypatch.setattr(lightning.pytorch.strategies.deepspeed, "_DEEPSPEED_GREATER_EQUAL_0_16", True)
    monkeypatch.setattr(DeepSpeedStrategy, "setup_environment", lambda self: None)
    strategy = DeepSpeed()
    strategy.accelerator = CUDAAccelerator.__new__(CUDAAccelerator)
    return strategy


def test_deepspeed_leaves_dtypes_to_autocast(deepspeed):
    assert not deepspeed.config["bf16"]["enabled"]
    assert not deepspeed.config["fp16"]["enabled"]
    x, weight = torch.ones(2, 2), torch.ones(2, 2)
    for precision, computed, given in (
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("bf16-true", torch.float32, torch.bfloat16),
    ):
        deepspeed.precision_plugin = DeepSpeedPrecision(precision)
        deepspeed.setup_environment()
        with deepspeed.precision_plugin.train_step_context():
            assert (x @ weight).dtype == computed, precision
        assert deepspeed.precision_plugin.convert_input(x).dtype == given, precision
    deepspeed.precision_plugin = DeepSpeedPrecision("16-mixed")
    with pytest.raises(SettingsError, match='"16-mixed", which would keep adapters in float16; nearest: "bf16-mixed"'):
        deepspeed.setup_environment()


def test_deepspeed_divides_a_loss_no_further(deepspeed):
    """Lightning has divided it by the batches of a window."""
    deepspeed.precision_plugin = DeepSpeedPrecision("32-true")
    deepspeed.setup_environment()
    calls = []
    module = LightningModule()
    module._trainer = SimpleNamespace(model=SimpleNamespace(backward=lambda loss, **how: calls.append((loss, how))))
    deepspeed.precision_plugin.backward(torch.ones(()), module, None)
    assert calls == [(torch.ones(()), {"scale_wrt_gas": False})]


@pytest.mark.parametrize(("batches", "window", "nearest"), [(7, 2, "limit_train_batches 6"), (2, 3, "fewer batches")])
def test_deepspeed_needs_whole_windows(deepspeed, batches, window, nearest):
    trainer = SimpleNamespace(num_training_batches=batches, accumulate_grad_batches=window)
    deepspeed._lightning_module = SimpleNamespace(trainer=trainer)
    with pytest.raises(
        SettingsError, match=f"{window}, which does not divide the {batches} batches .* {nearest}, or FSDP2"
    ):
        deepspeed.on_train_start()
    trainer.num_training_batches = 2 * window
    deepspeed.on_train_start()


@pytest.mark.parametrize(
    ("callback", "what"),
    [
        (SparsitySchedule(sparsity=0.5), "SparsitySchedule reads gradients, which"),
        (Cascade(stage_steps=2), "Cascade reads gradients, which"),
        (NoiseInjection(0.1), "NoiseInjection writes what trains between steps, whose copies"),
        (RankPruning(final_rank=1), None),
        (EarlyStopping("loss"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Callback) else "",
)
def test_callbacks_under_deepspeed(callback, what):
    strategy = DeepSpeed.__new__(DeepSpeed)
    if what is None:
        strategy.refuse([callback])
        return
    with pytest.raises(SettingsError, match=f"{what} DeepSpeed keeps to itself. Take FSDP2, or ddp"):
        strategy.refuse([callback])
