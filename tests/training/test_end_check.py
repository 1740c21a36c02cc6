"""A model that cannot learn to end its answers is named before it trains."""

from __future__ import annotations

import json

import pytest
import torch
from toy_runs import decoder_folder
from transformers import LlamaForCausalLM

from lora_lightning.cli.main import main
from lora_lightning.testing import tiny_decoder
from lora_lightning.training.end_check import row_setting


@pytest.mark.parametrize(("trained", "said"), [(False, True), (True, False)])
def test_an_end_that_pretraining_never_reached(tmp_path, monkeypatch, capsys, trained, said):
    monkeypatch.chdir(tmp_path)
    folder = decoder_folder(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[2] = model.lm_head.weight[3]
    model.save_pretrained(folder)
    rows = [[{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": "w5"}] for n in range(8)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    words = [f"--model.pretrained={folder}", "--model.task=causal-lm", "--model.method=LoRA", "--data=Chat"]
    words += ["--data.train=chats.jsonl", "--data.chat_template=plain", "--data.validation_fraction=0"]
    words += ["--trainer.max_steps=4", "--trainer.enable_progress_bar=false", "--data.batch_size=2"]
    words += ['--model.train_tokens=["[EOS]"]'] if trained else []
    assert main(["fit", *words]) == 0
    text = "note: [EOS], which ends an answer, has the same row in the output layer as 1 other tokens"
    out = " ".join(capsys.readouterr().out.split())
    assert (text in out) == said
    assert ('model.train_tokens: ["[EOS]"] trains its row.' in out) == said


def test_therow_setting_names_an_output_layer_of_its_own():
    assert row_setting(tiny_decoder(), "<end>") == '{"lm_head": ["<end>"]}'
    assert row_setting(tiny_decoder(tied=True), "<end>") == '["<end>"]'
