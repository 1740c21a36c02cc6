"""KeepBest, in a LightningModule of its own that logs a metric which falls again."""

from __future__ import annotations

import pytest
import torch
from projects import Plain, fit, loader

from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning.callbacks import InjectAdapters, KeepBest
from lora_lightning.callbacks.best import direction
from lora_lightning.errors import NoEffectError
from lora_lightning.storage.state import adapter_keys

SCORES = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.7, 5: 0.2, 6: 0.1}


class Scored(Plain):
    """Logs a score by step and remembers the adapter of each."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def validation_step(self, batch):
        step = self.trainer.global_step
        self.log("val_score", SCORES.get(step, 0.0))
        self.seen[step] = {k: v.clone() for k, v in self.state_dict().items() if ".adapters." in k}

    def val_dataloader(self):
        return loader()


def run(tmp_path, best, method, **options):
    module = Scored()
    adapters = InjectAdapters(method, ["used"], also_train=["head"])
    settings = {"max_steps": 6, "val_check_interval": 1, "limit_val_batches": 1, **options}
    fit(module, tmp_path, [adapters, best], **settings)
    return module


def test_the_state_of_the_best_validation_comes_back(tmp_path, capsys):
    best = KeepBest("val_score")
    module = run(tmp_path, best, LoRA(rank=2))
    assert best.step == 2
    assert best.values["val_score"] == pytest.approx(0.9)
    keys = adapter_keys(module)
    assert f"KeepBest: keeps {len(keys)} tensors ({keys[0]}, ...)" in capsys.readouterr().out
    now = {k: v for k, v in module.state_dict().items() if ".adapters." in k}
    assert all(torch.equal(now[key], value) for key, value in module.seen[2].items())
    assert any(not torch.equal(now[key], value) for key, value in module.seen[6].items())


def test_a_validation_inside_a_schedule_does_not_count(tmp_path):
    best = KeepBest("val_score")
    run(tmp_path, best, RoseLoRA(rank=2, sparsity=0.5, start=2, end=4))
    assert best.step == 4


def test_less_can_be_better(tmp_path):
    best = KeepBest("val_score", mode="min")
    run(tmp_path, best, LoRA(rank=2))
    assert best.step == 1


def test_no_adapter_is_an_error(tmp_path):
    with pytest.raises(NoEffectError, match=r"KeepBest found nothing to act on: it keeps adapters .*; there is none"):
        fit(Scored(), tmp_path, [KeepBest("val_score")], max_steps=2)


def test_an_unknown_metric_is_an_error(tmp_path):
    with pytest.raises(NoEffectError, match=r'KeepBest\.monitor is "val_acc"; the module logs val_score'):
        run(tmp_path, KeepBest("val_acc"), LoRA(rank=2))


def test_no_validation_after_the_schedule_is_an_error(tmp_path):
    with pytest.raises(NoEffectError, match="no validation with a finite value came while"):
        run(tmp_path, KeepBest("val_score"), RoseLoRA(rank=2, sparsity=0.5, start=2, end=5), val_check_interval=4)


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("val_loss", "min"),
        ("loss/val", "min"),
        ("val_perplexity", "min"),
        ("eval.wer", "min"),
        ("val_accuracy", "max"),
        ("val/F1", "max"),
        ("val_exact_match", "max"),
        ("val_x", None),
        ("glossary", None),
        ("val_closs", None),
    ],
)
def test_the_direction_is_in_the_name_of_a_metric_or_must_be_given(metric, mode):
    assert direction(metric) == mode
