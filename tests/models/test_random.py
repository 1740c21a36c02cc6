from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ll_lora import LoRA
from lora_lightning.errors import ModelError, SettingsError
from lora_lightning.models.loading import load_model
from lora_lightning.models.random import full_name, tokenizer_settings
from lora_lightning.models.tasks import find_task
from lora_lightning.training.module import AdapterModule

SIZES = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}


def test_weights_follow_from_the_name():
    task = find_task("seq2seq-lm")
    name = full_name("random:t5", SIZES, 3)
    assert name.startswith('random:t5:3:{"d_ff": 24')
    assert full_name(name, {}, 8) == name  # a seed that is stated stays
    before = torch.get_rng_state()
    one, same, other = (load_model(n, task) for n in (name, name, full_name("random:t5", SIZES, 4)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.shared.weight, other.shared.weight)
    assert one.config.d_model == 16
    assert not one.training


def test_what_follows_from_a_tokenizer():
    tokenizer = SimpleNamespace(
        bos_token_id=None, cls_token_id=7, eos_token_id=None, sep_token_id=8, pad_token_id=1, __len__=lambda: 0
    )
    tokenizer = type("Tokenizer", (), {**vars(tokenizer), "__len__": lambda self: 40})()
    assert tokenizer_settings("random:bart", tokenizer, {"vocab_size": 50}) == {
        "pad_token_id": 1,
        "bos_token_id": 7,
        "eos_token_id": 8,
        "decoder_start_token_id": 1,
        "forced_eos_token_id": 8,
    }
    assert tokenizer_settings("random:bert", tokenizer, {}) == {
        "vocab_size": 40,
        "pad_token_id": 1,
        "bos_token_id": 7,
        "eos_token_id": 8,
    }


def test_the_report_says_so():
    module = AdapterModule("random:t5", LoRA(rank=2), task="seq2seq-lm", random_config=SIZES, seed=5)
    module.configure_model()
    [note] = [note for note in module.injection.notes if "nothing is pretrained" in note]
    assert "random:t5:5:" in note
    again = AdapterModule("random:t5", LoRA(rank=2), task="seq2seq-lm", random_config=SIZES, seed=5)
    again.configure_model()
    assert torch.equal(module.model.shared.weight, again.model.shared.weight)


@pytest.mark.parametrize(
    ("name", "config", "error", "text"),
    [
        (
            "random:brt",
            {},
            ModelError,
            r'"random:brt"; transformers has no such model type. Did you mean "(bart|bert|bit|blt)"',
        ),
        ("random:t5", {"d_modell": 8}, SettingsError, r'random_config: t5 has no "d_modell". Did you mean "d_model"'),
        ("random:t5:x", {}, ModelError, r"after random:t5 there may stand a seed and settings as JSON only"),
        (
            "random:vit",
            {},
            ModelError,
            r'model.task is "seq2seq-lm", but "random:vit:1:{}" has no AutoModelForSeq2SeqLM',
        ),
    ],
)
def test_names_that_mean_nothing(name, config, error, text):
    with pytest.raises(error, match=text):
        AdapterModule(name, LoRA(rank=2), task="seq2seq-lm", random_config=config, seed=1).configure_model()


def test_settings_belong_to_random_models(tmp_path):
    with pytest.raises(SettingsError, match=r"random_config is \{'d_model': 4\}, but model.pretrained is \"x/y\""):
        AdapterModule("x/y", LoRA(), random_config={"d_model": 4})


def test_a_random_model_needs_a_tokenizer_of_its_own(tmp_path, monkeypatch, capsys):
    from lora_lightning.cli.main import main

    monkeypatch.chdir(tmp_path)
    Path("d.csv").write_text("source,target\na,b\n")
    words = ["--model.pretrained=random:t5", "--model.task=seq2seq-lm", "--model.method=LoRA", "--data=TextToText"]
    assert main(["fit", *words, "--data.train=d.csv", "--data.validation_fraction=0.0", "--trainer.max_steps=2"]) == 2
    assert "data.tokenizer is null" in capsys.readouterr().err
