"""axolotl's configs, in the shapes of its own examples."""

from __future__ import annotations

import pytest

from lora_lightning.cli.imports.axolotl import translate
from lora_lightning.data import Chat, Completions, PlainText, Preferences
from lora_lightning.errors import SettingsError

QLORA = {
    "model_type": "LlamaForCausalLM", "tokenizer_type": "AutoTokenizer", "load_in_8bit": False, "load_in_4bit": True,
    "strict": False, "dataset_prepared_path": None, "val_set_size": 0.05, "output_dir": "./outputs/out",
    "adapter": "qlora", "lora_model_dir": None, "sequence_len": 4096, "sample_packing": True,
    "eval_sample_packing": False, "pad_to_sequence_len": True, "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05,
    "lora_target_linear": True, "wandb_project": "mine", "wandb_entity": "us", "wandb_watch": None, "wandb_name": None,
    "gradient_accumulation_steps": 4, "micro_batch_size": 2, "num_epochs": 4, "optimizer": "paged_adamw_32bit",
    "lr_scheduler": "cosine", "learning_rate": 0.0002, "bf16": "auto", "tf32": False, "gradient_checkpointing": True,
    "resume_from_checkpoint": None, "logging_steps": 1, "flash_attention": True, "warmup_steps": 10,
    "evals_per_epoch": 4, "saves_per_epoch": 1, "weight_decay": 0.01, "fsdp": None,
    "special_tokens": {"pad_token": "<|end_of_text|>"}, "chat_template": "llama3",
    "datasets": [{"path": "owner/chats", "type": "chat_template", "split": "train"}],
}  # fmt: skip


def test_its_example_of_a_quantized_model(parsed, model):
    found, module, data, trainer = parsed({**QLORA, "base_model": model})
    assert (module.method.rank, module.method.alpha, module.method.dropout) == (32, 16.0, 0.05)
    assert (module.quantization, module.targets, module.attention) == ("nf4-double", "all-linear", "flash_attention_2")
    assert module.lr_scheduler.warmup_fraction == 0
    assert isinstance(data, Chat)
    assert (data.messages, data.chat_template, data.packing, data.max_length) == ("messages", "llama-3.1", True, 4096)
    assert found.config["data.train"] == "owner/chats::train"
    assert (data.batch_size, data.validation_fraction) == (2, 0.05)
    assert (trainer["max_epochs"], trainer["val_check_interval"]) == (4, 0.25)
    (logger,) = found.config["trainer.logger"]
    assert logger == {"class_path": "wandb", "init_args": {"project": "mine", "options": {"entity": "us"}}}
    assert set(found.lost) == {"warmup_steps", "optimizer", "special_tokens"}
    assert {"saves_per_epoch", "pad_to_sequence_len", "tf32", "strict"} <= set(found.unneeded)


def test_steps_make_a_fraction_of_a_warm_up(parsed, model):
    found, module, _, trainer = parsed({**QLORA, "base_model": model, "max_steps": 200, "evals_per_epoch": 0})
    assert module.lr_scheduler.warmup_fraction == 0.05
    assert (trainer["max_steps"], trainer["max_epochs"], trainer["limit_val_batches"]) == (200, -1, 0)
    assert "warmup_steps" not in found.lost


OWN = {"field_instruction": "q", "field_output": "a", "format": "[INST] {instruction} [/INST]"}
DATA = {
    "alpaca": ([{"path": "rows.jsonl", "type": "alpaca"}], Completions, {"format": "alpaca", "completion": "output"}),
    "turns of sharegpt": ([{"path": "a.jsonl", "type": "sharegpt"}], Chat, {"messages": "conversations"}),
    "turns under other names": (
        [{
            "path": "a.jsonl", "type": "chat_template", "field_messages": "turns",
            "message_property_mappings": {"role": "from", "content": "value"},
        }],
        Chat,
        {"messages": "turns"},
    ),
    "whole texts": ([{"path": "a.jsonl", "type": "completion", "field": "body"}], PlainText, {"text": "body"}),
    "a layout of one's own": (
        [{"path": "a.jsonl", "type": OWN}],
        Completions,
        {"prompt_template": "[INST] {q} [/INST]", "completion": "a"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_layouts_of_data(parsed, model, case):
    rows, kind, expected = DATA[case]
    found, _, data, _ = parsed({**QLORA, "base_model": model, "datasets": rows})
    assert type(data) is kind
    assert {name: getattr(data, name) for name in expected} == expected
    assert found.config["data.train"] == rows[0]["path"]
    assert not [name for name in found.lost if name.startswith("datasets")]


def test_data_that_cannot_be_read_are_named(parsed, model):
    rows = [
        {"path": "a.jsonl", "type": "chat_template", "shards": 4, "roles_to_train": ["user", "assistant"]},
        {"path": "b.jsonl", "type": "input_output"},
        {"path": "c.jsonl", "type": "chat_template"},
        {"path": "d.jsonl", "type": "alpaca"},
    ]
    found, _, _, _ = parsed({**QLORA, "base_model": model, "datasets": rows})
    assert found.config["data.train"] == ["a.jsonl", "c.jsonl"]
    assert "2 of 4 are of another layout than data: Chat" in found.lost["datasets"]
    assert {"datasets[0].shards", "datasets[0].roles_to_train", "datasets[1].type"} <= set(found.lost)


@pytest.mark.parametrize(
    ("changes", "settings", "columns"),
    [
        ({"rl": "dpo", "rl_beta": 0.2}, {"loss_type": "dpo", "beta": 0.2},
         {"type": "chatml.intel", "prompt": "question"}),
        ({"rl": "orpo", "orpo_alpha": 0.3}, {"loss_type": "orpo", "beta": 0.3},
         {"type": "chat_template.default", "field_messages": "turns", "prompt": "turns"}),
        ({"rl": "kto", "kto_desirable_weight": 0.5}, {"loss_type": "kto", "desirable_weight": 0.5},
         {"type": {"field_prompt": "q", "field_label": "good"}, "prompt": "q", "label": "good"}),
        ({"rl": "simpo", "simpo_gamma": 1.0}, {"loss_type": "simpo", "gamma": 1.0},
         {"type": "prompt_pairs", "prompt": "prompt"}),
    ],
    ids=["dpo", "orpo", "kto", "simpo"],
)  # fmt: skip
def test_preferences(parsed, model, changes, settings, columns):
    theirs = {name: value for name, value in columns.items() if name in ("type", "field_messages")}
    given = {**QLORA, **changes, "base_model": model, "datasets": [{"path": "a.jsonl", **theirs}]}
    found, module, data, _ = parsed(given)
    assert module.task.name == "preference"
    assert {name: getattr(module.task, name) for name in settings} == settings
    assert isinstance(data, Preferences)
    expected = {name: value for name, value in columns.items() if name in ("prompt", "label")}
    assert {name: getattr(data, name) for name in expected} == expected
    assert "sample_packing" in found.lost


def test_a_reward_model(parsed, model):
    rows = [{"path": "a.jsonl", "type": "chat_template.argilla_chat"}]
    _, module, data, _ = parsed({**QLORA, "base_model": model, "reward_model": True, "datasets": rows})
    assert module.task.name == "reward"
    assert isinstance(data, Preferences)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, r'adapter is "null", which trains the model in full'),
        ({"adapter": "lora", "rl": "grpo"}, r'rl is "grpo", for which there is no task here'),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path, settings, match):
    with pytest.raises(SettingsError, match=match):
        translate({"base_model": "m", **settings}, tmp_path)
