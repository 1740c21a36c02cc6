"""The sparsity schedule: its settings, what a checkpoint of its steps holds, and former spellings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from projects import Plain, fit

from ll_rose import RoseLoRA
from lora_lightning import callbacks
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
    assert field_names(SparsityFields) == ("sparsity", "beta", "start", "end", "keep_rule", "first_score", "clamp")
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
    assert schedule._saved_settings == schedule._settings()
