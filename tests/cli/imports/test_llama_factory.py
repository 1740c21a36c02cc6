"""LLaMA-Factory's configs, in the shapes of its own examples."""

from __future__ import annotations

import json

import pytest
import torch

from lora_lightning.cli.imports.llama_factory import translate
from lora_lightning.data import Chat, Completions, PlainText, Preferences
from lora_lightning.errors import SettingsError

SFT = {
    "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all",
    "dataset": "identity,alpaca_en_demo", "template": "llama3", "cutoff_len": 2048, "max_samples": 1000,
    "overwrite_cache": True, "preprocessing_num_workers": 16, "dataloader_num_workers": 4,
    "output_dir": "saves/llama3-8b/lora/sft", "logging_steps": 10, "save_steps": 500, "plot_loss": True,
    "overwrite_output_dir": True, "save_only_model": False, "report_to": "none", "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8, "learning_rate": "1.0e-4", "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True, "ddp_timeout": 180000000,
    "resume_from_checkpoint": None,
}  # fmt: skip
INFO = {
    "identity": {"file_name": "identity.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
    "alpaca_en_demo": {"file_name": "alpaca.json"},
    "owned": {"hf_hub_url": "owner/name", "subset": "en", "split": "train",
              "columns": {"prompt": "q", "response": "a"}},
    "pairs": {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt",
              "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
    "tagged": {"file_name": "kto.json", "columns": {"kto_tag": "good"}},
    "raw": {"file_name": "raw.jsonl", "columns": {"prompt": "text"}},
}  # fmt: skip


@pytest.fixture
def described(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(INFO))


def test_its_example_of_chats(parsed, described, model):
    found, module, data, trainer = parsed({**SFT, "model_name_or_path": model, "dataset": "identity"})
    assert module.task.name == "causal-lm"
    assert (type(module.method).__name__, module.method.rank, module.method.alpha) == ("LoRA", 8, 16.0)
    assert module.targets == "all-linear"
    assert module.lr_scheduler.warmup_fraction == 0.1
    assert module.lr_scheduler.decay == "cosine"
    optimizer = module.optimizer_factory([torch.nn.Parameter(torch.ones(1))])
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert isinstance(data, Chat)
    assert (data.messages, data.chat_template, data.max_length) == ("conversations", "llama-3.1", 2048)
    assert (data.batch_size, data.num_workers, data.limit) == (1, 4, 1000)
    assert data.validation_fraction == 0
    assert trainer["accumulate_grad_batches"] == 8
    assert (trainer["max_epochs"], trainer["precision"], trainer["gradient_clip_val"]) == (3, "bf16-true", 1.0)
    assert module.gradient_checkpointing
    assert found.lost == {}
    assert set(found.unneeded) == {
        "do_train", "overwrite_cache", "preprocessing_num_workers", "save_steps", "plot_loss", "overwrite_output_dir",
        "save_only_model", "ddp_timeout",
    }  # fmt: skip


def test_data_sets_of_two_layouts_and_a_template_for_plain_rows(parsed, described, model):
    found, _, data, _ = parsed({**SFT, "model_name_or_path": model})
    assert isinstance(data, Chat)
    assert "left out: alpaca_en_demo" in found.lost["dataset"]
    found, _, data, _ = parsed({**SFT, "model_name_or_path": model, "dataset": "alpaca_en_demo", "packing": True})
    assert isinstance(data, Completions)
    assert (data.format, data.completion, data.packing) == ("instruction", "output", True)
    assert "Completions learns texts as they are" in found.lost["template"]
    found, _, data, _ = parsed({**SFT, "model_name_or_path": model, "dataset": "owned"})
    assert (data.prompt_template, data.completion) == ("{q}\n", "a")
    assert found.config["data.train"] == "owner/name:en:train"


def test_without_the_file_that_describes_data(parsed, model):
    found, _, data, _ = parsed(
        {**SFT, "model_name_or_path": model, "dataset": "mine.json", "template": "qwen3_nothink"}
    )
    assert any("dataset_info.json was not found" in note for note in found.notes)
    assert found.config["data.train"] == "mine.json"
    assert (data.chat_template, data.chat_template_kwargs) == ("qwen-3", {"enable_thinking": False})


def test_a_quantized_dora_with_preferences(parsed, described, model):
    changes = {
        "model_name_or_path": model, "stage": "dpo", "dataset": "pairs", "pref_beta": 0.2, "pref_loss": "sigmoid",
        "dpo_label_smoothing": 0.1, "quantization_bit": 4, "use_dora": True, "use_rslora": True, "lora_alpha": 64,
        "lora_dropout": 0.05, "lora_target": "q_proj,v_proj", "additional_target": "embed_tokens", "flash_attn": "sdpa",
        "template": "nobody", "val_size": 0.1, "eval_strategy": "steps", "eval_steps": 50, "report_to": "wandb",
        "run_name": "trial", "loraplus_lr_ratio": 16.0, "pissa_init": True, "neftune_noise_alpha": 5, "new_thing": 1,
    }  # fmt: skip
    found, module, data, trainer = parsed({**SFT, **changes})
    assert module.task.name == "preference"
    assert (module.task.loss_type, module.task.beta, module.task.label_smoothing) == ("dpo", 0.2, 0.1)
    method = module.method
    assert (type(method).__name__, method.alpha, method.dropout, method.scaling_rule) == (
        "DoRA", 64.0, 0.05, "alpha/sqrt(r)",
    )  # fmt: skip
    assert module.targets == ["q_proj", "v_proj"]
    assert module.also_train == ["embed_tokens"]
    assert (module.quantization, module.attention) == ("nf4-double", "sdpa")
    assert isinstance(data, Preferences)
    assert (data.prompt, data.chosen, data.rejected, data.judged) == ("conversations", "chosen", "rejected", False)
    assert data.validation_fraction == 0.1
    assert (trainer["val_check_interval"], trainer["check_val_every_n_epoch"]) == (400, None)
    assert found.config["trainer.logger"] == [{"class_path": "wandb", "init_args": {"name": "trial"}}]
    assert found.nested()["model"]["optimizer"]["init_args"]["inner"]["init_args"]["lr"] == 1e-4
    assert set(found.lost) == {"template", "pissa_init", "neftune_noise_alpha", "new_thing"}
    assert "PiSSA" in found.lost["pissa_init"]
    text = found.text("theirs.yaml")
    assert "# Not carried over:" in text
    assert "#   new_thing: 1: nothing here stands for it" in text


@pytest.mark.parametrize(
    ("changes", "task", "kind", "expected"),
    [
        ({"stage": "kto", "dataset": "tagged", "kto_chosen_weight": 1.5}, "preference", Preferences, ("good", True)),
        ({"stage": "rm", "dataset": "pairs"}, "reward", Preferences, (None, False)),
        ({"stage": "pt", "dataset": "raw", "template": "default"}, "causal-lm", PlainText, None),
    ],
    ids=["kto", "reward", "plain texts"],
)
def test_other_stages(parsed, described, model, changes, task, kind, expected):
    _, module, data, _ = parsed({**SFT, "model_name_or_path": model, **changes})
    assert module.task.name == task
    assert isinstance(data, kind)
    if expected:
        assert (data.label, data.judged) == expected
    if changes["stage"] == "kto":
        assert (module.task.loss_type, module.task.desirable_weight) == ("kto", 1.5)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"stage": "ppo"}, r'stage is "ppo", for which there is no task here\. Stages: sft, pt'),
        ({"finetuning_type": "full"}, r'finetuning_type is "full"; adapters are trained here'),
        ({"learning_rate": "fast"}, r'learning_rate is "fast"; it must be a number'),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path, settings, match):
    with pytest.raises(SettingsError, match=match):
        translate({"model_name_or_path": "m", **settings}, tmp_path)
