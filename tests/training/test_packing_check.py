"""PackingCheck: models that keep packed examples apart pass, others are refused by name."""

from __future__ import annotations

import pytest
import torch
from resuming import SaveAt, assert_equal_runs, at_step, run
from rich.console import Console
from toy_runs import completion_data, decoder_folder, save_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ll_lora import LoRA
from lora_lightning.errors import ModelError
from lora_lightning.testing import tiny_decoder
from lora_lightning.training.module import AdapterModule
from lora_lightning.training.packing_check import PackingCheck, packing_difference
from lora_lightning.training.run_report import RunReport
from lora_lightning.training.summary import summary_table

SMALL = {"vocab_size": 50, "hidden_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
REFUSED = {
    "bloom": {**SMALL, "n_layer": 2, "n_head": 2},
    "falcon": {**SMALL, **LAYERS, "alibi": True},
    "mamba": {**SMALL, "num_hidden_layers": 2, "state_size": 4},
    "opt": {**SMALL, **LAYERS, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
}
ROWS = torch.randint(3, 40, (2, 21), generator=torch.Generator().manual_seed(0))


def random_model(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**REFUSED[name])).eval()


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_mix_packed_examples(name):
    net = random_model(name)
    message = rf"^data\.packing is True; {type(net).__name__} lets packed examples .* Set data\.packing to false"
    with pytest.raises(ModelError, match=message), torch.no_grad():
        packing_difference(net, ROWS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_that_keeps_them_apart(dtype):
    with torch.no_grad():
        assert packing_difference(tiny_decoder().to(dtype), ROWS % 32) < (0.1 if dtype == torch.bfloat16 else 1e-4)


def test_a_forward_that_takes_no_positions():
    with pytest.raises(ModelError, match=r"function cannot be told of packed examples \(.*position_ids"):
        packing_difference(lambda input_ids, use_cache: None, ROWS)


def module(folder, **options):
    return AdapterModule(str(folder), LoRA(rank=2, dropout=0.2), task="causal-lm", seed=1, **options)


@pytest.mark.parametrize(("step", "accumulate"), [(3, 1), (4, 2)])
def test_a_packed_run_resumes_exactly(tmp_path, step, accumulate):
    folder, saved = decoder_folder(tmp_path), tmp_path / "saved.ckpt"
    options = {"max_steps": 7, "accumulate_grad_batches": accumulate}

    def data():
        return completion_data(folder, packing=True, max_length=24, batch_size=1)

    straight = run(module(folder), data(), tmp_path, [SaveAt(saved, at_step(step))], **options)
    check = PackingCheck()
    resumed = run(module(folder), data(), tmp_path, [check], saved, seed=77, **options)
    assert_equal_runs(straight, resumed)
    assert check.difference is not None
    assert check.difference < 1e-4


def test_a_summary_counts_what_was_cut_and_dropped(tmp_path):
    folder = decoder_folder(tmp_path)
    (tmp_path / "pairs.csv").write_text("prompt,completion\nw1 w2,w3\nw1,\nw2 w3 w4 w5 w6,w7\n")
    report = RunReport(tmp_path / "run")
    run(module(folder), completion_data(folder, packing=True, max_length=5), tmp_path, [report], max_steps=4)
    counts = {"examples": 2, "truncated": 1, "dropped": 1, "skipped": 0}
    assert report.summary["data"] == {"train": counts, "validation": counts}
    with (console := Console(width=200)).capture() as capture:
        console.print(summary_table(report.summary))
    assert "data        1 train examples had nothing to learn and were left out" in capture.get()


def test_a_run_is_refused_before_its_first_step(tmp_path):
    random_model("opt").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    made = module(tmp_path)
    with pytest.raises(ModelError, match="OPTForCausalLM lets packed examples see one another"):
        run(made, completion_data(tmp_path, packing=True, max_length=24), tmp_path, max_steps=2)
    assert made.trainer.global_step == 0
    assert all(module.training for module in made.net.modules())
