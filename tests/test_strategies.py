"""Which strategies may carry an adapter."""

from __future__ import annotations

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lora_lightning import AdapterModule, plugins, strategies
from lora_lightning.__main__ import main
from lora_lightning.callbacks import Cascade, NoiseInjection, RankPruning, SparsitySchedule
from lora_lightning.errors import SettingsError
from lora_lightning.strategies import FSDP1, FSDP2, DeepSpeed, check_strategy


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (FSDPStrategy, r"strategy is FSDPStrategy, .*; nearest: FSDP1 \(--config strategies/fsdp\)"),
        (ModelParallelStrategy, r"strategy is ModelParallelStrategy, .*; nearest: FSDP2 \(--config strategies/fsdp2\)"),
        (DeepSpeedStrategy, r"strategy is DeepSpeedStrategy, .*; nearest: DeepSpeed \(--config strategies/deepspeed\)"),
    ],
)
def test_lightnings_own_sharded_strategies_are_refused(theirs, message):
    with pytest.raises(SettingsError, match=message):
        check_strategy(theirs.__new__(theirs))  # some cannot be made without a GPU or a package


@pytest.mark.parametrize("ours", [FSDP1, FSDP2, DeepSpeed, DDPStrategy])
def test_ours_are_not(ours):
    check_strategy(ours.__new__(ours))


def test_deepspeed_that_is_not_there_and_devices_it_does_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
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


@pytest.mark.parametrize(
    ("callback", "what"),
    [
        (SparsitySchedule(sparsity=0.5), "SparsitySchedule reads gradients, which"),
        (Cascade(stage_steps=2), "Cascade writes what trains between steps, whose copies"),
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


def test_the_module_refuses_before_it_loads(tmp_path):
    module = AdapterModule(pretrained="nowhere", task="causal-lm", method=plugins.method("LoRA")())
    trainer = Trainer(strategy=ModelParallelStrategy(), accelerator="cpu", devices=1, default_root_dir=tmp_path)
    module.trainer = trainer
    assert [str(error) for error in module.refusals() if "nearest: FSDP2" in str(error)]
    with pytest.raises(SettingsError, match="nearest: FSDP2"):
        module.configure_model()
