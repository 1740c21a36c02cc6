"""Settings that the tools share."""

from __future__ import annotations

import pytest

from lora_lightning.cli.imports import training
from lora_lightning.cli.imports.translation import Translation
from lora_lightning.cli.other_tools import TEMPLATES
from lora_lightning.data.chats.templates import NAMES


def translated(step, given, **options):
    t = Translation("a tool", given)
    step(t, **options)
    return t


@pytest.mark.parametrize("theirs", TEMPLATES)
def test_templates_are_ours(theirs):
    assert TEMPLATES[theirs][0] in NAMES
    t = translated(training.template, {"template": theirs}, name=theirs)
    assert t.config["data.chat_template"] == TEMPLATES[theirs][0]


@pytest.mark.parametrize(
    ("given", "expected", "lost"),
    [
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1}, ("constant", 0.1), set()),
        ({"lr_scheduler": "linear", "warmup_steps": 0.2}, ("linear", 0.2), set()),
        ({"lr_scheduler_type": "polynomial"}, ("cosine", 0.0), {"lr_scheduler_type"}),
        ({"lr_scheduler_type": "cosine_with_restarts"}, ("cosine", 0.0), {"lr_scheduler_type"}),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ("plateau", 0.0), set()),
        ({"warmup_steps": 30, "max_steps": 300}, ("linear", 0.1), set()),
    ],
)
def test_schedules(given, expected, lost):
    t = translated(training.schedule, given, decay="linear")
    places = ("model.lr_scheduler.decay", "model.lr_scheduler.warmup_fraction")
    assert tuple(t.config[place] for place in places) == expected
    assert set(t.lost) == lost


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"bf16": True}, {"trainer.precision": "bf16-true"}),
        ({"fp16": True}, {"trainer.precision": "16-mixed"}),
        ({"pure_bf16": True}, {"trainer.precision": "bf16-true", "model.half_adapters": True}),
        ({"bf16": False, "flash_attn": "fa2"}, {"model.attention": "flash_attention_2"}),
        ({"flash_attn": "auto"}, {}),
        ({"sdp_attention": True}, {"model.attention": "sdpa"}),
    ],
)
def test_numbers_and_kernels(given, expected):
    assert translated(training.precision, given).config == expected


def test_epochs_that_are_not_whole_and_fractions_of_steps():
    t = translated(training.length, {"num_train_epochs": 0.5, "eval_steps": 0.1}, epochs=3.0, batch=8)
    assert (t.config["trainer.max_epochs"], set(t.lost)) == (1, {"num_train_epochs", "eval_steps"})
    t = translated(training.length, {"max_steps": 100, "eval_steps": 0.1, "gradient_accumulation_steps": 2},
                   epochs=3.0, batch=8)  # fmt: skip
    assert t.config["trainer.val_check_interval"] == 20


def test_loggers():
    t = translated(training.logging, {"report_to": ["tensorboard", "swanlab"], "mlflow_experiment_name": "e"})
    assert t.config["trainer.logger"] == ["tensorboard", {"class_path": "mlflow", "init_args": {"experiment": "e"}}]
    assert "swanlab" in t.lost["report_to"]
    assert translated(training.logging, {"report_to": "none"}).config == {}
