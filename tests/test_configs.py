"""Every file in configs/ runs 12 steps through the real command line, and leaves a whole run."""

from __future__ import annotations

import csv
import functools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import completion_file, decoder_folder, encoder_folder, labelled_file

from ll_demo import pydocs
from lora_lightning.cli.configs import config_names
from lora_lightning.cli.main import main

SMALL = [
    "--trainer.max_steps=12",
    "--trainer.val_check_interval=12",
    "--trainer.limit_val_batches=4",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false",
    "--data.batch_size=4",
    "--data.max_length=16",
]


@pytest.fixture(scope="module", autouse=True)
def library_read_once():
    """The texts are the same in every run; reading the library takes seconds."""
    original = pydocs.library_docstrings
    pydocs.library_docstrings = functools.cache(original)
    yield
    pydocs.library_docstrings = original


METHODS = [name for name in config_names() if "/" not in name and name != "chat"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_config_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", name, *SMALL, "--data.limit=256"]) == 0
    run = tmp_path / "runs" / name / "001"
    assert capsys.readouterr().out.strip().endswith(f"run: runs/{name}/001")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["linear_baseline"] is not None
    assert (run / "adapter" / "adapter.safetensors").is_file()


@pytest.mark.slow
def test_from_a_file_of_chats_to_answers(tmp_path, monkeypatch, capsys):
    """README's second example, on a tiny model whose tokenizer has no template of its own."""
    monkeypatch.chdir(tmp_path)
    decoder = decoder_folder(tmp_path / "model")
    talks = [[{"role": "user", "content": f"w{n} w4"}, {"role": "assistant", "content": f"w{n}"}] for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in talks))
    flags = [f"--model.pretrained={decoder}", "--data.chat_template=plain", "--data.max_length=32"]
    assert main(["inspect-data", "chat", *flags]) == 0
    assert (
        main(["fit", "--config", "chat", *flags, "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]) == 0
    )
    told = capsys.readouterr().out
    assert told.strip().endswith("run: runs/chat/001")
    assert "\n          python -m lora_lightning chat runs/chat/001\n" in told
    (tmp_path / "asked.txt").write_text("w3 w4\n")
    assert (
        main(["generate", "runs/chat/001", "--input", "asked.txt", "--output", "said.jsonl", "--max_new_tokens=4"]) == 0
    )
    assert "prediction" in json.loads((tmp_path / "said.jsonl").read_text())
    assert main(["export", "runs/chat/001", "--format", "peft", "--output", "adapter"]) == 0
    words = ["--input", "asked.txt", "--output", "same.jsonl", "--max_new_tokens=4", f"--pretrained={decoder}"]
    assert main(["generate", "adapter", *words]) == 0  # the template of the run went with it
    assert (tmp_path / "same.jsonl").read_text() == (tmp_path / "said.jsonl").read_text()


TASKS = [name for name in config_names() if name.startswith("tasks/")]


KNOWN_TOKENS = "tasks/known_tokens"


def stories():
    """The folder of the small pretrained model that an example needs."""
    folder = Path(os.environ.get("LORA_LIGHTNING_TEST_DATA", "")) / "models" / "stories260k"
    return folder if folder.is_dir() else pytest.skip("needs LORA_LIGHTNING_TEST_DATA")


@pytest.mark.slow
def test_the_rows_of_known_tokens_train_beside_the_adapter_and_are_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = stories()
    run, summary = fitted(KNOWN_TOKENS)
    tensors = load_file(run / "adapter" / "adapter.safetensors")
    rows = {key: value for key, value in tensors.items() if key.endswith("token_rows")}
    assert {tuple(value.shape) for value in rows.values()} == {(1, 64)}
    base = load_file(model / "model.safetensors")
    embedding = next(value for key, value in base.items() if key.endswith("embed_tokens.weight"))
    assert not torch.equal(next(iter(rows.values()))[0], embedding[2].float())
    assert summary["steps"] == 12


def fitted(name):
    """The run folder of a task's example after 12 steps, and its summary."""
    small = [
        word
        for word in SMALL
        if name not in ("tasks/image_classification", "tasks/chat", "tasks/image_chat", KNOWN_TOKENS)
        or "max_length" not in word
    ]
    if name == KNOWN_TOKENS:
        small += [f"--model.pretrained={stories()}", "--data.max_length=256"]
    assert main(["fit", "--config", name, *small, "--data.limit=64"]) == 0
    run = Path("runs") / name.removeprefix("tasks/") / "001"
    return run, json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "tasks/chat" else pytest.mark.slow) for n in TASKS])
def test_a_task_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, summary = fitted(name)
    assert summary["steps"] == 12
    assert (summary["linear_baseline"] is not None) == summary["has_head"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_validated_and_predicts(name, tmp_path, monkeypatch, capsys):
    """It is validated with the numbers of its summary, predicts names and texts, and its data can be looked at."""
    monkeypatch.chdir(tmp_path)
    stem = name.removeprefix("tasks/")
    run, summary = fitted(name)
    capsys.readouterr()
    few = ["--trainer.limit_predict_batches=2", "--trainer.limit_val_batches=4", "--trainer.enable_progress_bar=false"]
    assert main(["validate", "--run", str(run), few[1], few[2]]) == 0
    shown = capsys.readouterr().out
    assert str(summary["values"]["loss"])[:5] in shown
    assert main(["predict", "--run", str(run), few[0], few[2], "--output", "out.csv"]) == 0
    with Path("out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert PREDICTED[stem] <= set(rows[0])
    assert all(row[column] for row in rows for column in PREDICTED[stem])
    table = ["--data.streaming=false"] if stem == "streaming" else []
    assert main(["inspect-data", name, "-n", "1", "--data.limit=64", *table]) == 0
    assert "--- train example 0" in capsys.readouterr().out


PREDICTED = {
    "chat": {"messages", "loss"},
    "known_tokens": {"messages", "loss"},
    "image_chat": {"messages", "loss"},
    "image_classification": {"image", "label", "prediction", "probability"},
    "masked_lm": {"text", "prediction", "fillings", "loss"},
    "multi_label": {"text", "labels", "probabilities"},
    "preference": {"reward_chosen", "reward_rejected", "margin"},
    "regression": {"text", "size", "prediction"},
    "reward": {"reward_chosen", "reward_rejected", "margin"},
    "seq2seq": {"source", "target", "loss"},
    "sentence_embedding": {"anchor", "positive", "similarity"},
    "sentence_similarity": {"first", "second", "score", "similarity"},
    "streaming": {"text", "loss"},
    "token_classification": {"tokens", "prediction", "tagged"},
}
"""Columns of the predictions of each task's example, by config."""


RECIPES = [name for name in config_names() if name.startswith("recipes/")]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if at else ()) for at, n in enumerate(RECIPES)]
)
def test_a_recipe_parses(name, capsys):
    assert main(["fit", "--config", name, "--print_config"]) == 0
    assert "class_path: ll_" in capsys.readouterr().out


SMALLER = {
    "recipes/beamlora_math": ["--model.method.rank=2", "--model.method.stage_steps=2", "--model.method.end=6"],
    "recipes/ce_lora_math": [
        "--model.method.rank=2",
        "--model.method.svd_rank=2",
        "--model.overrides={q_proj: {kept: 1.0}}",
    ],
    "recipes/cora_instructions": ["--model.method.sources=null", "--model.method.rank=2"],
    "recipes/dora_commonsense": ["--model.method.rank=2"],
    "recipes/ffa_lora_gsm8k": ["--model.method.clients=2", "--model.method.local_steps=2"],
    "recipes/gelora_glue": [
        "--model.targets=[query, key, value]",
        "--model.method.calibration_batches=24",
        "--model.method.pooling=mean",
    ],
    "recipes/lors_sparse_llama": ["--model.method.rank=2", "--model.method.init.batches=2"],
    "recipes/lorasc_instructions": ["--model.method.inner.init_args.rank=2", "--model.method.stage_steps=4"],
    "recipes/relora_text": [
        "--model.method.inner.init_args.rank=2",
        "--model.method.stage_steps=4",
        "--model.method.rewarm_steps=2",
    ],
    "recipes/cola_superglue": ["--model.method.inner.init_args.rank=2"],
    "recipes/periodic_lora_llama": ["--model.method.inner.init_args.rank=2", "--model.method.stage_steps=3"],
    "recipes/rac_lora_glue": ["--model.method.stage_epochs=1"],
    "recipes/xgblora_instructions": ["--model.method.active_layers=3", "--model.method.stage_steps=2"],
    "recipes/prilora_glue": ["--model.method.every_n_steps=2"],
    "recipes/pst_mnli": [
        "--model.method.rank=2",
        "--model.method.score_rank=2",
        "--model.method.start=2",
        "--model.method.end=6",
    ],
    "recipes/sara_instructions": ["--model.method.threshold=0.01"],
    "recipes/mora_math": ["--model.method.rank=2"],
    "recipes/neat_glue": ["--model.method.rank=2"],
    "recipes/multilora_llama": ["--model.method.rank=2"],
    "recipes/reslora_math": ["--model.method.rank=2"],
    "recipes/riemannian_moe_llama": ["--model.method.rank=1", "--model.method.router_lr_ratio=1.0"],
    "recipes/pissa_math": ["--model.method.rank=2"],
    "recipes/olora_instructions": ["--model.method.rank=2"],
    "recipes/eva_math": ["--model.method.rank=2", "--model.method.init.batches=2"],
    "recipes/lora_ga_math": ["--model.method.rank=2", "--model.method.init.batches=2"],
    "recipes/corda_math": ["--model.method.rank=2", "--model.method.init.batches=2"],
    "recipes/sbora_commonsense": ["--model.method.rank=2"],
    "recipes/rose_editing": ["--model.method.rank=2", "--model.method.start=2", "--model.method.end=6"],
    "recipes/sora_glue": ["--model.method.rank=2", "--data.columns=null"],
    "recipes/adalora_mnli": [
        "--model.method.rank=2",
        "--model.method.start=2",
        "--model.method.end=6",
        "--data.text=text",
        "--data.text_pair=text",
    ],
}


CLASSIFIES = ("adalora_mnli", "gelora_glue", "neat_glue", "prilora_glue", "pst_mnli", "rac_lora_glue", "sora_glue")


def tiny_data(name, folder):
    """What puts a tiny model and rows of its words in the place of a recipe's."""
    if name.partition("/")[2] in CLASSIFIES:
        model, rows = encoder_folder(folder / "encoder"), labelled_file(folder / "rows.csv")
        columns = ["--data.text=text", "--data.text_pair=null"]
    elif name == "recipes/relora_text":
        model, rows, columns = decoder_folder(folder / "decoder"), labelled_file(folder / "rows.csv"), []
    else:
        model, rows = decoder_folder(folder / "decoder"), completion_file(folder / "pairs.csv")
        columns = ["--data.prompt=prompt", "--data.completion=completion"]
    return [f"--model.pretrained={model}", f"--data.train={rows}", f"--data.validation={rows}", *columns]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "recipes/loftq_math"])  # it quantizes on a GPU
def test_a_recipe_trains_a_tiny_model(name, tmp_path, monkeypatch):
    """Its own settings, but for sizes that a model of width 16 has no room for."""
    monkeypatch.chdir(tmp_path)
    sizes = ["--data.batch_size=2", "--data.max_length=16", "--trainer.max_steps=8", "--trainer.precision=32-true"]
    sizes.append("--trainer.accumulate_grad_batches=1")
    words = [*tiny_data(name, tmp_path), *sizes, "--trainer.num_sanity_val_steps=0", *SMALLER[name]]
    assert (
        main(["fit", "--config", name, *words, "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]) == 0
    )
    [summary] = (tmp_path / "runs").glob("*/001/summary.json")
    assert json.loads(summary.read_text())["steps"] == 8


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
