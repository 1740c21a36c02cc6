"""Starts by configuration: on the command line, in a run folder, and on resume, where nothing is computed again."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy_runs import encoder_folder, labelled_file

from ll_eva.start import EVA
from lora_lightning.cli.compare.describe import describe
from lora_lightning.cli.main import main

CONFIG = """
seed_everything: 5
model:
  pretrained: model
  method: {class_path: LoRA, init_args: {rank: 2, dropout: 0.1}}
  targets: [query, value]
  optimizer: {class_path: AdamW, init_args: {lr: 1.0e-2}}
  linear_baseline: false
data:
  class_path: LabelledText
  init_args: {train: model/train.csv, validation: model/dev.csv, batch_size: 4}
trainer: {max_steps: 6, max_epochs: -1, val_check_interval: 3, check_val_every_n_epoch: null, accelerator: cpu,
  enable_progress_bar: false, log_every_n_steps: 1}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = encoder_folder(tmp_path / "model")
    labelled_file(folder / "train.csv", rows=40)
    labelled_file(folder / "dev.csv", rows=20, seed=1)
    (tmp_path / "toy.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_start_by_its_name_with_settings(here):
    words = ["--model.method.init", "EVA", "--model.method.init.rho", "1.5", "--model.method.init.batches", "2"]
    assert main(["fit", "--config", "toy.yaml", *words]) == 0
    run = here / "runs/toy/001"
    written = yaml.safe_load((run / "config.yaml").read_text())["model"]["method"]["init_args"]["init"]
    assert written["init_args"]["rho"] == 1.5
    assert '"class_path": "EVA"' in (run / "adapter/adapter.json").read_text()


def test_a_resume_reads_nothing_again(here, monkeypatch):
    words = ["--model.method.init", "EVA", "--model.method.init.batches", "2"]
    assert main(["fit", "--config", "toy.yaml", *words]) == 0
    assert main(["fit", "--config", "toy.yaml", *words, "--trainer.max_steps", "3"]) == 0
    monkeypatch.setattr(EVA, "plan", lambda *_: pytest.fail("the plan was asked for again"))
    monkeypatch.setattr(EVA, "factors", lambda *_: pytest.fail("the start was computed again"))
    assert main(["fit", "--resume", "runs/toy/002", "--trainer.max_steps", "6"]) == 0
    tensors = [load_file(here / f"runs/toy/00{n}/adapter/adapter.safetensors") for n in (1, 2)]
    assert tensors[0].keys() == tensors[1].keys()
    assert [name for name in tensors[0] if tensors[0][name].shape != tensors[1][name].shape] == []


@pytest.mark.slow
@pytest.mark.parametrize("start", ["PiSSA", "LoRAGA"])
def test_a_run_with_a_start_is_validated_resumed_and_exported(here, start):
    init = ["--model.method.init", start]
    assert main(["fit", "--config", "toy.yaml", *init]) == 0
    assert main(["fit", "--config", "toy.yaml", *init, "--trainer.max_steps", "6"]) == 0
    one, two = (load_file(here / f"runs/toy/00{n}/adapter/adapter.safetensors") for n in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(name.endswith("start_A") for name in one)
    assert main(["validate", "--run", "runs/toy/001"]) == 0
    assert main(["export", "runs/toy/001", "--format", "peft", "--output", "peft"]) == 0
    assert json.loads((here / "peft/adapter_config.json").read_text())["r"] == 4


def test_an_unknown_start_names_the_nearest(here, capsys):
    assert main(["fit", "--config", "toy.yaml", "--model.method.init", "PISA"]) == 2
    assert "PiSSA" in capsys.readouterr().err


def test_methods_and_show_name_starts(capsys):
    assert main(["methods"]) == 0
    assert "PiSSA" in capsys.readouterr().out
    assert main(["show", "EVA"]) == 0
    assert "rho" in capsys.readouterr().out
    assert main(["cite", "PiSSA"]) == 0
    assert "meng2024pissa" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("config", ["eva", "pissa"])
def test_what_is_estimated_and_compared_computes_no_start(config, capsys):
    assert describe(["--config", config]).adapter_numbers == describe(["--config", "lora"]).adapter_numbers
    assert main(["estimate", config]) == 0
    assert "error" not in capsys.readouterr().err
