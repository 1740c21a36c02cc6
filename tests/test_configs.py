"""Every file in configs/ runs 12 steps through the real command line, and leaves a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_lightning.__main__ import main
from lora_lightning.argv import config_names

SMALL = [
    "--trainer.max_steps=12",
    "--trainer.val_check_interval=12",
    "--trainer.limit_val_batches=4",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false",
    "--data.batch_size=4",
    "--data.max_length=16",
]


@pytest.mark.parametrize("name", [name for name in config_names() if "/" not in name])
def test_a_config_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", name, *SMALL]) == 0
    run = tmp_path / "runs" / name / "001"
    assert capsys.readouterr().out.strip().endswith(f"run: runs/{name}/001")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["linear_baseline"] is not None
    assert (run / "adapter" / "adapter.safetensors").is_file()


@pytest.mark.parametrize("name", [name for name in config_names() if name.startswith("recipes/")])
def test_a_recipe_parses(name, capsys):
    assert main(["fit", "--config", name, "--print_config"]) == 0
    assert "class_path: ll_" in capsys.readouterr().out


@pytest.mark.slow
def test_the_shipped_run_beats_the_linear_baseline_by_two_points(tmp_path, monkeypatch):
    """The main job's target, for the shipped seed; the card of the plugin reports three."""
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "rose", "--trainer.enable_progress_bar=false"]) == 0
    summary = json.loads(Path("runs/rose/001/summary.json").read_text())
    assert summary["values"]["accuracy"] >= summary["linear_baseline"]["accuracy"] + 0.02
    assert summary["report"]["sparsity"] >= 0.8
    assert summary["report"]["density"] <= summary["report"]["density_bound"]
    assert summary["versions"]["torch"]
