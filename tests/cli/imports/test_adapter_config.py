"""peft's own configuration, written by peft where it is installed."""

from __future__ import annotations

import json

import pytest

from lora_lightning.cli.imports.adapter_config import translate
from lora_lightning.cli.imports.files import translated
from lora_lightning.errors import SettingsError


def test_a_file_that_peft_has_written(tmp_path, parsed, model):
    peft = pytest.importorskip("peft")
    peft.LoraConfig(
        r=4,
        lora_alpha=12,
        lora_dropout=0.1,
        use_dora=True,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"],
        rank_pattern={"layers.0.self_attn.q_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 3},
        exclude_modules=["layers.1"],
        base_model_name_or_path=model,
        task_type="CAUSAL_LM",
    ).save_pretrained(tmp_path / "adapter")
    given = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    found, module, _, _ = parsed(given)
    method = module.method
    assert (type(method).__name__, method.rank, method.alpha, method.dropout) == ("DoRA", 4, 12.0, 0.1)
    assert method.scaling_rule == "alpha/sqrt(r)"
    assert module.targets == ["q_proj", "v_proj"]
    assert (module.exclude, module.also_train) == (["layers.1"], ["lm_head"])
    assert module.overrides == {"layers.0.self_attn.q_proj": {"rank": 2, "alpha": 3.0}}
    assert module.task.name == "causal-lm"
    assert found.lost == {}
    assert any("to go on from the trained weights, set model.adapter" in note for note in found.notes)
    assert translated(tmp_path / "adapter").config == found.config  # a folder does as well


def test_what_cannot_be_trained_is_named(tmp_path):
    given = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 8, "init_lora_weights": "pissa", "bias": "all", "lora_bias": True,
        "layers_to_transform": [0, 1], "loftq_config": {"bits": 4}, "layer_replication": None, "revision": "abc",
        "task_type": "FEATURE_EXTRACTION", "eva_config": None, "fan_in_fan_out": False, "target_modules": ".*q_proj",
    }  # fmt: skip
    found = translate(given, tmp_path)
    assert set(found.lost) == {
        "init_lora_weights", "bias", "lora_bias", "layers_to_transform", "loftq_config", "revision", "task_type",
        "base_model_name_or_path",
    }  # fmt: skip
    assert "PiSSA" in found.lost["init_lora_weights"]
    assert found.config["model.targets"] == ".*q_proj"
    assert translate({**given, "init_lora_weights": "gaussian"}, tmp_path).config["model.method.start"] == "gaussian"


def test_another_kind_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r'peft_type is "IA3"; LORA is read'):
        translate({"peft_type": "IA3"}, tmp_path)
