"""`lr: auto`: where it may stand, where the search starts, and a run that equals one with the number it found."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace
from safetensors.torch import load_file
from toy_runs import encoder_folder, labelled_file

from lora_lightning.cli.auto_rate import auto_rate, is_auto, marked
from lora_lightning.cli.lightning import build
from lora_lightning.cli.main import main

CONFIG = """
seed_everything: 5
model:
  pretrained: model
  method: {class_path: LoRA, init_args: {rank: 2, dropout: 0.1}}
  targets: [query, value]
  optimizer: {class_path: AdamW, init_args: {lr: auto, weight_decay: 0.0}}
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
    (tmp_path / "auto.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rates(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())["model"]["optimizer"]["init_args"]


def test_a_run_equals_one_with_the_number_that_was_found(here, capsys):
    assert main(["fit", "--config", "auto.yaml", "--model.linear_baseline", "false"]) == 0
    said = capsys.readouterr().out
    found = rates(here / "runs/auto/001")["lr"]
    assert f"rate: {found:g}, " in said
    assert "by a range test around 0.001 (lr: auto)" in said
    assert 1e-3 / 60 <= found <= 15e-3
    assert found != 1e-3
    given = ["--model.optimizer.lr", repr(found), "--model.linear_baseline", "false"]
    assert main(["fit", "--config", "auto.yaml", *given]) == 0
    auto, number = (load_file(here / f"runs/auto/00{n}/adapter/adapter.safetensors") for n in (1, 2))
    assert auto.keys() == number.keys()
    assert all(torch.equal(auto[name], number[name]) for name in auto)
    assert not list(here.rglob(".lr_find*"))


AROUND = "model.optimizer.inner"
OTHERS = {
    "LoRAPlus": (["LoRAPlus", "--model.optimizer.ratio", "4", f"--{AROUND}", "AdamW"], f"{AROUND}.lr"),
    "SlowFast": (["SlowFast", f"--{AROUND}", "AdamW"], f"{AROUND}.lr"),
    "RiemannianAdamW": (["RiemannianAdamW"], "model.optimizer.lr"),
    "LoRASC": (
        ["AdamW", "--model.method", "LoRASC", "--model.method.inner", "LoRA", "--model.method.inner.rank", "2",
         "--model.method.stage_steps", "3"],
        "model.optimizer.lr",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_with_other_optimizers_and_stages_it_equals_one_with_the_number_too(here, name):
    words, rate = OTHERS[name]
    base = ["fit", "--config", "auto.yaml", "--model.linear_baseline", "false", "--model.optimizer", *words]
    assert main([*base, f"--{rate}", "auto"]) == 0
    settings = rates(here / "runs/auto/001")
    found = settings["inner"]["init_args"]["lr"] if "inner" in rate else settings["lr"]
    assert main([*base, f"--{rate}", repr(found)]) == 0
    auto, number = (load_file(here / f"runs/auto/00{n}/adapter/adapter.safetensors") for n in (1, 2))
    assert all(torch.equal(auto[one], number[one]) for one in auto)


@pytest.mark.slow
def test_a_run_that_resumes_keeps_the_number(here, capsys):
    assert main(["fit", "--config", "auto.yaml", "--model.linear_baseline", "false"]) == 0
    found = rates(here / "runs/auto/001")["lr"]
    capsys.readouterr()
    assert main(["fit", "--resume", "runs/auto/001", "--trainer.max_steps", "8"]) == 0
    assert rates(here / "runs/auto/001")["lr"] == found
    assert "range test" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--model.optimizer.lr", "auto"],
        ["--model.optimizer.lr=auto"],
        ["--model.optimizer.init_args.lr", "auto"],
        ["--model.optimizer", "{class_path: AdamW, init_args: {lr: auto}}"],
        ["--model.optimizer", "LoRAPlus", "--model.optimizer.inner", "AdamW", "--model.optimizer.inner.lr", "auto"],
    ],
)
def test_where_it_may_stand(here, words):
    module, _ = build(["--config", "auto.yaml", "--model.optimizer.lr", "0.1", *words])
    assert module.optimizer_factory is not None
    made = module.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
    assert made.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_what_is_checked_before_a_run_takes_the_start(here, capsys):
    assert main(["doctor", "--config", "auto.yaml"]) == 0
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.optimizer.lr", "automatic"], r"model\.optimizer\.lr is \"automatic\""),
        (["--model.optimizer.weight_decay", "auto"], r"model\.optimizer\.weight_decay is \"auto\""),
    ],
)
def test_other_words_are_no_rate(here, capsys, words, said):
    assert main(["fit", "--config", "auto.yaml", *words]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_where_the_search_starts(monkeypatch):
    from ll_lora import LoRA

    monkeypatch.setattr(LoRA, "rate_ratio", 3.0)
    settings = Namespace(class_path="torch.optim.AdamW", init_args=Namespace(lr=math.nan))
    inner = Namespace(class_path="ll_lora.LoRA", init_args=Namespace(rank=2))
    around = Namespace(class_path="ll_lorasc.LoRASC", init_args=Namespace(inner=inner))
    found = auto_rate(settings, around)
    assert found is not None
    assert (found.start, settings.init_args.lr) == (pytest.approx(3e-3), pytest.approx(3e-3))
    found.set(0.5)
    assert settings.init_args.lr == 0.5
    assert auto_rate(settings, None) is None
    assert auto_rate(None, None) is None


def test_words_and_settings():
    assert marked(["--model.optimizer.lr", "auto", "--trainer.strategy", "auto"])[1::2] == [".nan", "auto"]
    assert is_auto("lr", "auto", "model.optimizer.inner")
    assert not is_auto("lr", "auto", "model.method")
    assert not is_auto("lr", "continue", "model.optimizer")
