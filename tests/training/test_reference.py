"""The reference of preference losses: the base model's values, computed once, whatever has become of the adapter."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from preference_runs import LOSSES, pairs_file, preference, preference_data
from resuming import SaveAt, assert_equal_runs, at_step, run
from small_methods import small_methods
from toy_runs import decoder_folder, trainer
from transformers import AutoModelForCausalLM

from ll_lora import LoRA
from lora_lightning.cli.main import main
from lora_lightning.errors import DataError
from lora_lightning.injection.records import injected_root, iter_adapters
from lora_lightning.injection.switches import disable_adapters
from lora_lightning.training import reference
from lora_lightning.training.reference import ReferenceValues, base_digest, keep, read


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return decoder_folder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    return folder / "lora_lightning" / "reference"


@pytest.fixture
def computed(monkeypatch):
    """The splits whose values were computed, not found."""
    splits, compute = [], ReferenceValues._compute

    def counted(self, trainer, module, split):
        splits.append(split)
        return compute(self, trainer, module, split)

    monkeypatch.setattr(ReferenceValues, "_compute", counted)
    return splits


def by_hand(decoder, data, split):
    """Log-probabilities of each text by itself under the pretrained model, in float64."""
    model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float64)
    rows = []
    for example in data.examples(split):
        sides = []
        for ids, labels in zip(example["input_ids"], example["labels"], strict=True):
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            places = [n for n, label in enumerate(labels) if label != -100 and n]
            sides.append(sum(float(scores[n - 1, ids[n]]) for n in places))
        rows.append(sides)
    return torch.tensor(rows)


@pytest.mark.parametrize("loss_type", ["dpo", "kto"])
def test_values_are_the_pretrained_models(decoder, tmp_path, loss_type):
    """Heads that train in full are the base's own for it; here the embedding does."""
    data = preference_data(decoder, loss_type, batch_size=3)
    module = preference(decoder, loss_type=loss_type, also_train=["embed_tokens"])
    trainer(tmp_path, max_steps=3).fit(module, datamodule=data)
    for split in ("train", "validation"):
        values = data.collation(split, ("index",), None).tables[split]
        torch.testing.assert_close(values, by_hand(decoder, data, split), atol=1e-4, rtol=1e-5)


def test_a_resumed_run_finds_its_values(decoder, tmp_path, computed):
    saved, options = tmp_path / "saved.ckpt", {"max_steps": 4, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    inside = SaveAt(saved, lambda trainer, batch_idx: trainer.global_step == 1 and batch_idx == 2)
    whole = run(preference(decoder), preference_data(decoder), tmp_path, [inside], **options)
    assert_equal_runs(whole, run(preference(decoder), preference_data(decoder), tmp_path, [], saved, 77, **options))
    assert computed == ["train"]


def test_values_are_computed_once(decoder, tmp_path, computed, capsys):
    def fit(**settings):
        computed.clear()
        trainer(tmp_path, max_steps=2).fit(
            preference(decoder, LoRA(rank=3)), datamodule=preference_data(decoder, **settings)
        )
        return list(computed)

    assert fit(validation_batch_size=7) == ["train"]  # validation rows are the same ones, and found
    assert (
        "reference   the base model, its adapters off: 20 train rows, 20 validation rows (kept"
        in capsys.readouterr().out
    )
    assert fit() == []
    assert fit(max_length=5) == ["train"]
    assert fit(unpair=False, prompt="chosen") == ["train"]


def test_validate_and_predict_find_what_fit_has_kept(decoder, tmp_path, computed):
    module, data = preference(decoder), preference_data(decoder)
    validated = {"val_check_interval": 3, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
    fit = trainer(tmp_path, max_steps=3, **validated)
    fit.fit(module, datamodule=data)
    expected = {name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("val_")}
    computed.clear()
    again = trainer(tmp_path, limit_val_batches=1.0)
    (measured,) = again.validate(module, datamodule=preference_data(decoder, validation_batch_size=6), verbose=False)
    assert measured["val_margin"] == pytest.approx(
        measured["val_reward_chosen"] - measured["val_reward_rejected"], abs=1e-6
    )
    rows = [row for batch in again.predict(module, datamodule=preference_data(decoder)) for row in batch]
    assert computed == []
    assert sum(row["margin"] for row in rows) / len(rows) == pytest.approx(measured["val_margin"], abs=1e-5)
    assert measured == pytest.approx(expected, abs=1e-5)


def test_another_base_or_other_heads_have_values_of_their_own(decoder, tmp_path):
    module = preference(decoder, also_train=["embed_tokens"])
    module.trainer = trainer(tmp_path)
    module.trainer.datamodule = None
    module.configure_model()
    root = injected_root(module)
    with disable_adapters(root):
        first = base_digest(root)
    for _, layer in iter_adapters(root):
        for parameter in layer.adapters.parameters():
            parameter.data += 1
    with torch.no_grad():  # the adapter's own embedding
        root.get_input_embeddings().weight += 1
    with disable_adapters(root):
        assert base_digest(root) == first
        weight = next(p for n, p in root.named_parameters() if n.endswith("q_proj.base.weight"))
        weight.data[0, 0] += 1
        assert base_digest(root) != first
        weight.data[0, 0] -= 1
        root.get_input_embeddings().weight.data[3, 3] += 1
        assert base_digest(root) != first


METHODS = small_methods()


def method_run(name, decoder, folder, callbacks=(), checkpoint=None, seed=3):
    module = preference(decoder, small_methods()[name], optimizer=None)
    options = {"max_steps": 4, "limit_val_batches": 0}
    return run(module, preference_data(decoder), folder, callbacks, checkpoint, seed, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_trains_and_says_where_it_starts(name, decoder, tmp_path, computed, capsys):
    trained = method_run(name, decoder, tmp_path)
    assert trained["step"] == 4
    assert computed == ["train"]
    away = "the adapter starts away from it" in capsys.readouterr().out
    assert away is not METHODS[name].starts_at_base


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_resumes_exactly_without_computing_again(name, decoder, tmp_path, computed, cache):
    saved = tmp_path / "saved.ckpt"
    whole = method_run(name, decoder, tmp_path, [SaveAt(saved, at_step(2))])
    kept = {file: file.read_bytes() for file in cache.rglob("*.safetensors")}
    assert_equal_runs(whole, method_run(name, decoder, tmp_path, [], saved, seed=77))
    assert computed == ["train"]
    shutil.rmtree(cache)  # a trained adapter, and what it has folded, leave the reference as it was
    assert_equal_runs(whole, method_run(name, decoder, tmp_path, [], saved, seed=78))
    assert computed == ["train", "train"]
    assert {file: file.read_bytes() for file in cache.rglob("*.safetensors")} == kept


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", [*LOSSES[:-1], pytest.param(LOSSES[-1], marks=pytest.mark.slow)])
def test_each_loss_raises_the_margin(loss_type, decoder, tmp_path):
    module, data = preference(decoder, LoRA(rank=4), loss_type), preference_data(decoder, loss_type)
    fit = trainer(tmp_path, max_steps=25, val_check_interval=5, check_val_every_n_epoch=None, limit_val_batches=1.0)
    fit.fit(module, datamodule=data)
    before = next(c for c in fit.callbacks if type(c).__name__ == "LinearBaseline").result.untrained
    after = {name.removeprefix("val_"): float(value) for name, value in fit.callback_metrics.items()}
    assert after["accuracy"] > 0.85
    assert after["margin"] > before["margin"] + 0.005
    assert after["loss"] < before["loss"]
    assert {
        "train_accuracy",
        "train_margin",
        "train_reward_chosen",
        "train_reward_rejected",
    } <= fit.callback_metrics.keys()


@pytest.mark.parametrize(
    "loss_type", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ipo", "orpo", "simpo"))]
)
def test_accumulated_batches_take_the_step_of_one(loss_type, decoder, tmp_path):
    """The last window of an epoch holds fewer pairs, each of which counts as much as any other of its window."""
    states = []
    for batch_size, accumulate in ((6, 1), (2, 3), (3, 2)):
        module = preference(decoder, loss_type=loss_type)
        fit = trainer(tmp_path, max_steps=4, accumulate_grad_batches=accumulate, limit_val_batches=0)
        fit.fit(module, datamodule=preference_data(decoder, batch_size=batch_size))
        states.append([p.detach().clone() for p in module.parameters() if p.requires_grad])
    for one, two, three in zip(*states, strict=True):
        torch.testing.assert_close(one, two, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(one, three, atol=2e-6, rtol=1e-4)


def test_pairs_for_a_loss_of_labels_are_refused_before_the_model_is_loaded(decoder, tmp_path):
    with pytest.raises(DataError, match=r"data.unpair to true"):
        trainer(tmp_path).fit(preference("no folder", loss_type="kto"), datamodule=preference_data(decoder))


def test_values_that_cannot_be_read_are_computed(cache):
    keep("ab", torch.ones(2, 2))
    assert torch.equal(read("ab"), torch.ones(2, 2))
    (cache / "ab" / "values.safetensors").write_bytes(b"short")
    assert read("ab") is None
    assert read("cd") is None


def test_a_disk_that_takes_nothing_is_no_error(cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the place of the folder")
    keep("ab", torch.ones(2, 2))
    assert f"the reference's values are not kept in {reference._folder()}" in caplog.text


@pytest.mark.slow
def test_predictions_and_exports_of_a_run(decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = pairs_file(tmp_path / "rows.jsonl")
    Path("small.yaml").write_text(f"""
model:
  pretrained: {decoder}
  task: preference
  task_settings: {{beta: 0.5}}
  method: {{class_path: LoRA, init_args: {{rank: 2}}}}
data:
  class_path: Preferences
  init_args: {{train: {rows}, validation: {rows}, batch_size: 4}}
trainer: {{accelerator: cpu, max_steps: 4, enable_progress_bar: false, log_every_n_steps: 1}}
""")
    assert main(["fit", "--config", "small.yaml"]) in (0, None)
    assert main(["predict", "--run", "runs/small/001", "--output", "rows.csv"]) in (0, None)
    with Path("rows.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 20
    assert float(found[0]["margin"]) == pytest.approx(
        float(found[0]["reward_chosen"]) - float(found[0]["reward_rejected"]), abs=2e-6
    )
    assert main(["export", "runs/small/001", "--output", "merged", "--format", "merged"]) in (0, None)
    merged = AutoModelForCausalLM.from_pretrained("merged")
    base = AutoModelForCausalLM.from_pretrained(decoder)
    data = preference_data(decoder, predict=str(rows))
    data.prepare("predict")
    example = data.examples("predict")[0]
    rewards = []
    for ids, labels in zip(example["input_ids"], example["labels"], strict=True):
        places = [n for n, label in enumerate(labels) if label != -100]
        with torch.no_grad():
            own, theirs = (m(torch.tensor([ids])).logits[0].log_softmax(-1) for m in (merged, base))
        rewards.append(0.5 * sum(float(own[n - 1, ids[n]] - theirs[n - 1, ids[n]]) for n in places))
    assert [float(found[0][f"reward_{side}"]) for side in ("chosen", "rejected")] == pytest.approx(rewards, abs=1e-4)
