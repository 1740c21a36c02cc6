"""What a resumed run compares with the one it goes on with, also where that one spelled a setting otherwise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ll_lorasc.optim import SlowFast
from lora_lightning.callbacks import Cascade, TrainingGuard
from lora_lightning.callbacks.resume import _renamed_facts, _run_facts
from lora_lightning.methods import renamed
from lora_lightning.optim.warmup import WarmUp

RUNS = Path(__file__).parents[1] / "old_files/runs"


def old(run):
    return torch.load(RUNS / run / "last.ckpt", weights_only=True)


def a_run(optimizer, schedule):
    trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(automatic_optimization=True),
        estimated_stepping_batches=8,
        num_training_batches=10,
        accumulate_grad_batches=1,
        gradient_clip_val=None,
        optimizers=[optimizer],
    )
    return trainer, SimpleNamespace(lr_scheduler=schedule)


def slow_fast():
    return SlowFast([nn.Parameter(torch.ones(2))], lambda p: torch.optim.AdamW(p, lr=0.01), every_n_steps=2)


def test_facts_of_an_older_run_are_compared_under_the_names_of_today():
    saved = old("lorasc/001")["lora_lightning_resume"]["run"]
    assert saved["learning-rate schedule"] == {"share": 0.25, "decay": "linear"}
    assert saved["optimizer 0"]["share"] == 0.5
    trainer, module = a_run(slow_fast(), WarmUp(warmup_fraction=0.25))
    assert _renamed_facts(saved, trainer) == _run_facts(trainer, module)


@pytest.mark.parametrize(("fraction", "blend"), [(0.5, 0.5), (0.25, 0.4)])
def test_facts_that_differ_are_found_all_the_same(fraction, blend):
    saved = old("lorasc/001")["lora_lightning_resume"]["run"]
    optimizer = SlowFast([nn.Parameter(torch.ones(2))], lambda p: torch.optim.AdamW(p, lr=0.01), blend, 2)
    trainer, module = a_run(optimizer, WarmUp(warmup_fraction=fraction))
    assert _renamed_facts(saved, trainer) != _run_facts(trainer, module)


def test_a_wrapper_around_a_wrapper_hands_on_former_names():
    from ll_optimizers.plus import LoRAPlus

    outer = LoRAPlus([nn.Parameter(torch.ones(2))], inner=lambda p: SlowFast(p, torch.optim.AdamW))
    trainer, _ = a_run(outer, None)
    assert _renamed_facts({"optimizer 0": {"share": 0.5}}, trainer) == {"optimizer 0": {"blend": 0.5}}


def test_the_stages_of_an_older_run_go_on():
    saved = old("lorasc_lora/002")["callbacks"]["Cascade"]
    cascade = Cascade(stage_steps=3, blend=0.5, rule="figure_ema", noise=0.1)
    cascade.load_state_dict(saved)
    assert cascade._saved_settings.items() <= cascade._settings().items()
    assert cascade.stage == saved["stage"] > 0


def test_the_guard_of_an_older_run_goes_on():
    saved = old("lorasc_lora/002")["callbacks"]["TrainingGuard"]
    assert saved["moved"]
    guard = TrainingGuard()
    guard.load_state_dict(saved)
    assert guard._restored == renamed(saved, {"moved": "changed"})
    assert guard._restored["changed"] == saved["moved"]
