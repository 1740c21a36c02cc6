"""Sequence to sequence: loss and metrics against formulas, against greedy decoding, and the whole way to the export."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from resuming import SaveAt, assert_equal_runs, run
from torch.nn.utils.rnn import pad_sequence
from toy_runs import WORDS, save_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from ll_lora import LoRA
from lora_lightning.cli.main import main
from lora_lightning.data import TextToText
from lora_lightning.models.tasks import find_task
from lora_lightning.models.tasks.base import metrics, update_metrics
from lora_lightning.training.module import AdapterModule

SIZES = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}


@pytest.fixture
def folder(tmp_path):
    save_tokenizer(tmp_path)
    rows = [(WORDS[i % 9], WORDS[i % 7], WORDS[(i * i) % 11]) for i in range(24)]
    lines = ["source,target", *(f"{a} {b} {c} w2{i},{c} {b}" for i, (a, b, c) in enumerate(rows))]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def data_of(folder, **settings) -> TextToText:
    options = {"train": str(folder / "rows.csv"), "validation": str(folder / "rows.csv"), "tokenizer": str(folder)}
    return TextToText(**{**options, "batch_size": 4, **settings})


def tiny_t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(**SIZES, vocab_size=12, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    ).eval()


@torch.no_grad()
def test_metrics_are_those_of_greedy_decoding():
    task, model = find_task("seq2seq-lm"), tiny_t5()
    sources = torch.randint(2, 12, (6, 5))
    mask = torch.ones_like(sources)
    made = model.generate(input_ids=sources, attention_mask=mask, max_new_tokens=4, do_sample=False)[:, 1:]
    ends = [int((row == 1).nonzero()[0]) + 1 if (row == 1).any() else 4 for row in made]
    targets = [row[:end].clone() for row, end in zip(made, ends, strict=True)]
    targets[1][0] = (targets[1][0] + 1) % 10 + 2  # two that are wrong
    targets[4][-1] = (targets[4][-1] + 1) % 10 + 2
    labels = pad_sequence(targets, batch_first=True, padding_value=-100)
    batch = {"input_ids": sources, "attention_mask": mask, "labels": labels}
    scores = task.logits(model, batch)
    collection = metrics(task, model)
    update_metrics(task, collection, scores, batch)
    keep = labels != -100
    log_p = scores[keep].double().log_softmax(-1)
    right = log_p.argmax(-1) == labels[keep]
    found = {name: float(value) for name, value in collection.compute().items()}
    expected = {
        "loss": -float(log_p[range(len(right)), labels[keep]].mean()),
        "accuracy": float(right.double().mean()),
        "exact_match": 4 / 6,
    }
    assert found == pytest.approx(expected, rel=1e-5)
    theirs = model(**batch).loss
    assert found["loss"] == pytest.approx(float(theirs), rel=1e-5)


def test_resume(folder, tmp_path):
    saved = tmp_path / "saved.ckpt"

    def fit(callbacks, checkpoint=None, seed=3):
        module = AdapterModule("random:t5", LoRA(rank=2), task="seq2seq-lm", seed=1, random_config=SIZES)
        return run(
            module, data_of(folder), tmp_path, callbacks, checkpoint, seed, accumulate_grad_batches=2, max_steps=5
        )

    inside = SaveAt(saved, lambda trainer, batch_idx: trainer.current_epoch == 1 and batch_idx == 2)
    assert_equal_runs(fit([inside]), fit([], saved, seed=77))


def test_train_predict_and_export_from_random_numbers(folder, monkeypatch, capsys):
    """The base of the adapter is made again from its name for validate, predict and export."""
    monkeypatch.chdir(folder)
    words = [
        *("--model.pretrained=random:t5", "--model.task=seq2seq-lm", f"--model.random_config={SIZES}"),
        *("--model.method=LoRA", "--model.also_train=[shared]", "--model.max_new_tokens=4", "--data=TextToText"),
        *("--data.train=rows.csv", "--data.tokenizer=.", "--data.validation_fraction=0.3", "--data.batch_size=4"),
        *("--trainer.max_steps=6", "--trainer.num_sanity_val_steps=0"),
    ]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert main(["fit", *words, *quiet]) == 0
    assert "nothing is pretrained" in capsys.readouterr().out
    assert main(["predict", "--run", "runs/run/001", *quiet, "--output=p.csv"]) == 0
    assert main(["export", "runs/run/001", "--format", "merged", "--output", "merged"]) == 0
    with Path("p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["source", "target", "index", "prediction", "loss"]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("merged"), AutoTokenizer.from_pretrained(".")
    for row in rows[:3]:
        made = model.generate(**tokenizer(row["source"], return_tensors="pt"), max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(made[0], skip_special_tokens=True) == row["prediction"]
