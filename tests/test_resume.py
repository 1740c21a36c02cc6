"""Resume equals not having stopped: every tensor, at any step, mid-ramp and inside an accumulation window."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from resuming import SaveAt, assert_equal_runs, at_step, run
from toy_runs import classification, completion_data, completion_file, decoder_folder, encoder_folder, labelled_data

from ll_lora import LoRA
from ll_rose import RoseLoRA
from lora_lightning.callbacks import RankPruning
from lora_lightning.data import LabelledText
from lora_lightning.errors import ResumeError
from lora_lightning.optim.warmup import WarmUp
from lora_lightning.training.module import AdapterModule


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"), dropout=0.1)


METHODS = {
    "LoRA": lambda: LoRA(rank=2, dropout=0.2),
    "LoRA-bias": lambda: LoRA(rank=2, bias=True, train="B"),
    "RoseLoRA": lambda: RoseLoRA(rank=2, sparsity=0.7, dropout=0.1),
}


DIAGONAL = [("LoRA", 1, 1), ("LoRA-bias", 5, 1), ("RoseLoRA", 5, 1), ("RoseLoRA", 8, 2)]
"""Method, step, batches a step; step 8 of two batches each ends the epoch."""
EVERY = [(method, step, accumulate) for method in METHODS for step in (1, 5, 8) for accumulate in (1, 2)]


@pytest.mark.parametrize(
    ("method", "step", "accumulate"),
    [*DIAGONAL, *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in DIAGONAL)],
)
def test_resume_at_any_step(encoder, tmp_path, method, step, accumulate):
    saved = tmp_path / "saved.ckpt"
    # with epochs bounded, Lightning makes the loader before it has read the checkpoint
    options = {"accumulate_grad_batches": accumulate, "max_steps": 10, "max_epochs": 3}
    make = METHODS[method]
    straight = run(
        classification(encoder, make()), labelled_data(encoder), tmp_path, [SaveAt(saved, at_step(step))], **options
    )
    resumed = run(classification(encoder, make()), labelled_data(encoder), tmp_path, (), saved, seed=77, **options)
    assert_equal_runs(straight, resumed)


def test_resume_inside_an_accumulation_window(encoder, tmp_path):
    saved = tmp_path / "saved.ckpt"
    options = {"accumulate_grad_batches": 4, "max_steps": 6}
    make = METHODS["RoseLoRA"]
    inside = SaveAt(saved, lambda trainer, batch_idx: trainer.global_step == 3 and batch_idx % 4 == 1)
    straight = run(classification(encoder, make()), labelled_data(encoder), tmp_path, [inside], **options)
    assert torch.load(saved, weights_only=True)["lora_lightning_resume"]["ranks"][0]["gradients"]
    resumed = run(classification(encoder, make()), labelled_data(encoder), tmp_path, (), saved, seed=77, **options)
    assert_equal_runs(straight, resumed)


def test_resume_of_a_causal_lm_with_windows(tmp_path):
    folder, saved = decoder_folder(tmp_path), tmp_path / "saved.ckpt"
    options = {"accumulate_grad_batches": 2, "max_steps": 8}

    def module():
        return AdapterModule(str(folder), LoRA(rank=2), task="causal-lm", seed=1)

    straight = run(module(), completion_data(folder), tmp_path, [SaveAt(saved, at_step(4))], **options)
    resumed = run(module(), completion_data(folder), tmp_path, (), saved, seed=77, **options)
    assert_equal_runs(straight, resumed)


def test_resume_of_rank_pruning(encoder, tmp_path):
    saved = tmp_path / "saved.ckpt"

    def callbacks():
        return [RankPruning(1, start=2, end=8)]

    straight = run(
        classification(encoder, LoRA(rank=4)),
        labelled_data(encoder),
        tmp_path,
        [*callbacks(), SaveAt(saved, at_step(5))],
    )
    resumed = run(classification(encoder, LoRA(rank=4)), labelled_data(encoder), tmp_path, callbacks(), saved, seed=77)
    assert_equal_runs(straight, resumed)
    masks = [value for name, value in straight["state"].items() if name.endswith("rank_mask")]
    assert all(int(mask.sum()) == 1 for mask in masks)


@pytest.fixture(scope="module")
def written(encoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "saved.ckpt"
    callbacks = [SaveAt(path, at_step(4))]
    run(classification(encoder, LoRA(rank=2)), labelled_data(encoder), path.parent, callbacks, max_steps=5)
    return path


@pytest.fixture
def saved(written, tmp_path):
    """A checkpoint of four steps, which the test may change."""
    return Path(shutil.copy(written, tmp_path))


def test_a_checkpoint_holds_the_adapter_and_never_the_base(encoder, saved):
    module = classification(encoder, LoRA(rank=2))
    module.configure_model = lambda: None
    checkpoint = torch.load(saved, weights_only=True)
    keys = set(checkpoint["state_dict"])
    assert keys
    assert all(".adapters." in key or "classifier" in key or "pooler" in key for key in keys)
    assert checkpoint["lora_lightning"]["method"] == "LoRA"
    stored = sum(value.numel() for value in checkpoint["state_dict"].values())
    assert stored == sum(p.numel() for p in _trainable(encoder)) + _mask_entries(checkpoint)


def _trainable(encoder):
    from lora_lightning.models.loading import load_model
    from lora_lightning.models.tasks import find_task

    model = load_model(str(encoder), find_task("sequence-classification"), 3)
    from lora_lightning import inject

    inject(model, LoRA(rank=2), ["query", "value"])
    return [p for p in model.parameters() if p.requires_grad]


def _mask_entries(checkpoint):
    return sum(value.numel() for key, value in checkpoint["state_dict"].items() if key.endswith("rank_mask"))


def test_another_length_is_refused(encoder, tmp_path, saved):
    with pytest.raises(ResumeError, match="started with optimizer steps 5 and would go on with 9"):
        run(classification(encoder, LoRA(rank=2)), labelled_data(encoder), tmp_path, (), saved, max_steps=9)


def test_another_rank_is_refused(encoder, tmp_path, saved):
    with pytest.raises(ResumeError, match=r"LoRA.rank is 3; the checkpoint was trained with 2"):
        run(classification(encoder, LoRA(rank=3)), labelled_data(encoder), tmp_path, (), saved, max_steps=5)


CHANGED = {
    "alpha": ({"method": LoRA(rank=2, alpha=1.0)}, {}, r"LoRA.alpha is 1.0; the checkpoint was trained with 16.0"),
    "method": ({"method": RoseLoRA(rank=2)}, {}, r"was trained with LoRA; the model has RoseLoRA"),
    "targets": ({"targets": ["query"]}, {}, r"was trained with other layers: .*value"),
    "schedule": ({"lr_scheduler": WarmUp(decay="constant")}, {}, r"started with learning-rate schedule .*linear"),
    "optimizer": (
        {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=5.0)},
        {},
        r"optimizer 0 \{'lr': 0.001, 'weight_decay': 0.0\} and would go on with \{'lr': 5.0, .*\(model.adapter\)",
    ),
    "batches": ({}, {"batch_size": 6}, r"started with batches an epoch 15.0 and would go on with 10.0"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_another_setting_is_refused(encoder, tmp_path, saved, case):
    options, data, message = CHANGED[case]
    settings = {"method": LoRA(rank=2), **options}
    with pytest.raises(ResumeError, match=message):
        run(
            classification(encoder, settings.pop("method"), **settings),
            labelled_data(encoder, **data),
            tmp_path,
            (),
            saved,
            max_steps=5,
        )


def test_other_class_names_are_refused(encoder, tmp_path, saved):
    file = tmp_path / "renamed.csv"
    file.write_text((encoder / "train.csv").read_text().replace(",c0", ",z0"))
    data = LabelledText(train=str(file), validation=str(file), tokenizer=str(encoder), batch_size=4)
    with pytest.raises(ResumeError, match=r"was trained with other labels: \['c0'\] there, \['z0'\] here"):
        run(classification(encoder, LoRA(rank=2)), data, tmp_path, (), saved, max_steps=5)


def test_another_base_is_refused(encoder, tmp_path, saved):
    other = encoder_folder(tmp_path / "other", dropout=0.1)
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(other)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.add_(0.5)
    model.save_pretrained(other)
    with pytest.raises(ResumeError, match=r"another base model \(weights differ\)"):
        run(classification(other, LoRA(rank=2)), labelled_data(encoder), tmp_path, (), saved, max_steps=5)


def test_a_foreign_checkpoint_is_refused(encoder, tmp_path, saved):
    checkpoint = torch.load(saved, weights_only=True)
    del checkpoint["lora_lightning"]
    torch.save(checkpoint, saved)
    with pytest.raises(ResumeError, match="not written by AdapterModule"):
        run(classification(encoder, LoRA(rank=2)), labelled_data(encoder), tmp_path, (), saved, max_steps=5)


def test_a_checkpoint_of_an_interrupted_step_is_refused(encoder, tmp_path, saved):
    checkpoint = torch.load(saved, weights_only=True)
    del checkpoint["lora_lightning_resume"]
    torch.save(checkpoint, saved)
    with pytest.raises(ResumeError, match="not written while training went on"):
        run(classification(encoder, LoRA(rank=2)), labelled_data(encoder), tmp_path, (), saved, max_steps=5)


def test_another_number_of_processes_goes_on_with_the_same_tensors_but_not_inside_a_window(
    encoder, tmp_path, saved, capsys
):
    checkpoint = torch.load(saved, weights_only=True)
    checkpoint["lora_lightning_resume"]["ranks"] *= 2
    torch.save(checkpoint, saved)
    run(classification(encoder, LoRA(rank=2)), labelled_data(encoder), tmp_path, (), saved, max_steps=5)
    assert "resume: 1 processes instead of 2" in capsys.readouterr().out
    checkpoint["lora_lightning_resume"]["ranks"][0]["gradients"] = {"a": torch.zeros(1)}
    torch.save(checkpoint, saved)
    with pytest.raises(ResumeError, match="written by 2 processes inside an accumulation window; this run has 1"):
        run(classification(encoder, LoRA(rank=2)), labelled_data(encoder), tmp_path, (), saved, max_steps=5)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_resume_of_a_stream_inside_a_window(tmp_path, workers):
    folder, saved = decoder_folder(tmp_path), tmp_path / "saved.ckpt"
    for name, rows in (("one", 24), ("two", 9)):
        file = completion_file(tmp_path / f"{name}.csv", rows, seed=rows)
        lines = [line.split(",") for line in file.read_text().splitlines()[1:]]
        text = "\n".join(json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    options = {"accumulate_grad_batches": 3, "max_steps": 8, "max_epochs": 9}

    def data():
        train = [str(tmp_path / name) for name in ("one.jsonl", "two.jsonl")]
        settings = {"streaming": True, "packing": True, "max_length": 24, "batch_size": 1, "shuffle_block": 5}
        return completion_data(folder, train=train, num_workers=workers, **settings)

    def module():
        return AdapterModule(str(folder), LoRA(rank=2, dropout=0.1), task="causal-lm", seed=1)

    inside = SaveAt(saved, lambda trainer, batch_idx: trainer.global_step == 4 and batch_idx % 3 == 1)
    straight = run(module(), data(), tmp_path, [inside], **options)
    resumed = run(module(), data(), tmp_path, (), saved, seed=77, **options)
    assert straight["step"] == 8
    assert_equal_runs(straight, resumed)
