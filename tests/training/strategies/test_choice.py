"""Which sharded strategies know adapters."""

from __future__ import annotations

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lora_lightning import AdapterModule, plugins
from lora_lightning.errors import SettingsError
from lora_lightning.training.strategies import DeepSpeed
from lora_lightning.training.strategies.choice import check_strategy
from lora_lightning.training.strategies.fsdp1 import FSDP1
from lora_lightning.training.strategies.fsdp2 import FSDP2


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


def test_the_module_refuses_before_it_loads(tmp_path):
    module = AdapterModule(pretrained="nowhere", task="causal-lm", method=plugins.method("LoRA")())
    trainer = Trainer(strategy=ModelParallelStrategy(), accelerator="cpu", devices=1, default_root_dir=tmp_path)
    module.trainer = trainer
    assert [str(error) for error in module.refusals() if "nearest: FSDP2" in str(error)]
    with pytest.raises(SettingsError, match="nearest: FSDP2"):
        module.configure_model()
