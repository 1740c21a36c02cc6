"""The command line end to end: a run folder with everything in it, the verbs that read it, resume, and bad input."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from safetensors.torch import load_file
from toy_runs import completion_file, decoder_folder, encoder_folder, labelled_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lora_lightning as ll
from lora_lightning.callbacks import SparsitySchedule
from lora_lightning.cli import run_folder
from lora_lightning.cli.main import main
from lora_lightning.training.module import AdapterModule

TINY = """
seed_everything: 5
model:
  pretrained: model
  method: {class_path: RoseLoRA, init_args: {rank: 2, sparsity: 0.5, dropout: 0.1}}
  targets: [query, value]
  optimizer: {class_path: AdamW, init_args: {lr: 1.0e-2}}
data:
  class_path: LabelledText
  init_args: {train: model/train.csv, validation: model/dev.csv, batch_size: 4}
trainer:
  max_steps: 8
  max_epochs: -1
  val_check_interval: 4
  check_val_every_n_epoch: null
  log_every_n_steps: 1
  enable_progress_bar: false
  accelerator: cpu
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A tiny model, data and config."""
    place = tmp_path_factory.mktemp("prepared")
    folder = encoder_folder(place / "model")
    labelled_file(folder / "train.csv", rows=40)
    labelled_file(folder / "dev.csv", rows=20, seed=1)
    (place / "tiny.yaml").write_text(TINY)
    return place


@pytest.fixture
def here(prepared, tmp_path, monkeypatch):
    """A working folder with a copy of them and nothing else."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    """What a fit leaves beside them."""
    place = tmp_path_factory.mktemp("finished")
    shutil.copytree(prepared, place, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["fit", "--config", "tiny.yaml"]) == 0
    return place / "runs"


@pytest.fixture
def trained(here, finished):
    """A working folder with a copy of that run, runs/tiny/001, for tests of what comes after a fit."""
    shutil.copytree(finished, here / "runs")
    return here


def lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_a_refused_value_of_the_data_is_one_line(here, capsys):
    assert main(["fit", "--config", "tiny.yaml", "--data.batch_size", "0"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: LabelledText.batch_size is 0; it must be at least 1.")
    assert err.count("\n") == 1


class Moves(Callback):
    """What a user's code may do while it trains: change the directory."""

    def on_train_batch_end(self, trainer, *args):
        os.chdir("/")


@pytest.mark.slow
def test_a_program_that_changes_its_directory_still_writes_into_the_run_folder(here, capsys):
    line = [
        "fit",
        "--config",
        "tiny.yaml",
        "--trainer.callbacks+",
        f"{__name__}.Moves",
        "--checkpoint_minutes",
        "0.0001",
    ]
    assert main(line) == 0
    assert Path.cwd() == Path("/")
    assert lines(capsys)[-1] == "run: runs/tiny/001"
    run = here / "runs/tiny/001"
    assert {"adapter", "last.ckpt", "metrics.csv", "summary.json"} <= {path.name for path in run.iterdir()}
    assert json.loads((run / "summary.json").read_text())["adapter_dir"] == "runs/tiny/001/adapter"
    events = [path for path in run.iterdir() if path.name.startswith("events.out.tfevents")]
    assert len(events) == 1
    assert "train_loss" in events[0].read_bytes().decode("latin-1")


VERBS = [
    "inspect-data",
    *(pytest.param(verb, marks=pytest.mark.slow) for verb in ("targets", "estimate", "doctor", "cite")),
]


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_verbs_that_take_a_config_take_that_of_a_run(trained, capsys, verb):
    assert main([verb, "runs/tiny/001/config.yaml"]) == 0, capsys.readouterr()


def test_a_fit_leaves_a_whole_run_folder(here, capsys):
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    out = lines(capsys)
    assert out[-1] == "run: runs/tiny/001"
    run = Path("runs/tiny/001")
    names = {path.name for path in run.iterdir()}
    assert {"adapter", "last.ckpt", "config.yaml", "metrics.csv", "report.png", "summary.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run / "summary.json").read_text())
    assert {"method", "metric", "values", "untrained", "linear_baseline", "trainable_parameters"} <= set(summary)
    assert {"surviving_parameters", "adapter_dir", "seconds", "seed", "threads", "versions"} <= set(summary)
    assert summary["method"] == "RoseLoRA"
    assert (summary["settings"]["sparsity"], summary["rate"], summary["optimizer"]) == (0.5, 0.01, ["AdamW"])
    hparams = yaml.safe_load((run / "hparams.yaml").read_text())
    assert (hparams["method.sparsity"], hparams["rate"], hparams["total_steps"]) == (0.5, 0.01, 8)
    assert any(re.fullmatch(r"step 8 of 8: .*train_loss [\d.]+.*", line) for line in out)
    assert summary["adapter_dir"] == "runs/tiny/001/adapter"
    tensors = load_file(run / "adapter" / "adapter.safetensors")
    factors = {name: value for name, value in tensors.items() if "lora_" in name}
    assert summary["surviving_parameters"] == sum(int((value != 0).sum()) for value in factors.values())
    assert summary["report"]["sparsity"] >= 0.5
    assert run_folder.VARIABLE not in os.environ
    assert not list(run.rglob("*.writing"))
    text = "\n".join(out)
    for shown in (
        "4 layers adapted",
        "untrained head",
        "linear baseline",
        "RoseLoRA",
        "density bound",
        "adapter     runs",
    ):
        assert shown in text


@pytest.mark.slow
def test_runs_are_numbered_and_the_config_of_one_repeats_it(trained, capsys):
    assert main(["fit", "--config", "runs/tiny/001/config.yaml"]) == 0
    assert lines(capsys)[-1] == "run: runs/config/001"
    one, two = (load_file(f"runs/{name}/001/adapter/adapter.safetensors") for name in ("tiny", "config"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert main(["fit", "--config", "tiny.yaml", "--seed_everything", "6"]) == 0
    assert lines(capsys)[-1] == "run: runs/tiny/002"
    assert yaml.safe_load(Path("runs/tiny/002/config.yaml").read_text())["seed_everything"] == 6


@pytest.mark.slow
def test_predictions_of_a_run_on_top_of_several_adapters_are_those_of_all_of_them(trained, capsys):
    lora = ["--model.method=LoRA", "--model.method.rank=2", "--model.targets=[query,key]"]
    assert main(["fit", "--config", "tiny.yaml", *lora, "--model.linear_baseline=false"]) == 0
    below = "--model.adapter=[runs/tiny/001,runs/tiny/002]"
    assert main(["fit", "--config", "tiny.yaml", *lora, "--model.targets=[value]", below]) == 0
    assert "export runs/tiny/003 --format merged" in capsys.readouterr().out
    assert main(["predict", "--run", "runs/tiny/003", "--output", "out.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert main(["export", "runs/tiny/003", "--format", "merged", "--output", "merged"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained("merged").eval()
    tokenizer = AutoTokenizer.from_pretrained("model")
    values = []
    for row in rows:
        with torch.no_grad():
            found = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        values.append(float(found.max()))
        assert model.config.id2label[int(found.argmax())] == row["prediction"]
    assert [row["probability"] for row in rows] == pytest.approx(values, abs=2e-6)
    base = AutoModelForSequenceClassification.from_pretrained("model")
    ll.load_adapter(base, "runs/tiny/001/adapter")
    with torch.no_grad():
        first = base.eval()(**tokenizer(rows[0]["text"], return_tensors="pt")).logits.softmax(-1)
    assert float(first.max()) != pytest.approx(rows[0]["probability"], abs=1e-4)


def test_validate_test_and_predict_read_the_run_and_write_nothing_there(trained, capsys):
    run = Path("runs/tiny/001")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run.rglob("*"))
    summary = json.loads((run / "summary.json").read_text())
    capsys.readouterr()
    assert main(["validate", "--run", str(run)]) == 0
    shown = capsys.readouterr().out
    measured = re.search(r"val_accuracy\W+([\d.]+)", shown)
    assert float(measured[1]) == pytest.approx(summary["values"]["accuracy"], abs=1e-6)
    assert main(["test", "--run", str(run), "--data.test", "model/train.csv"]) == 0
    assert "test_accuracy" in capsys.readouterr().out
    assert main(["predict", "--run", str(run), "--output", "out.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(20))
    assert {"text", "label", "prediction", "probability"} <= set(rows[0])
    right = sum(row["prediction"] == row["label"] for row in rows) / len(rows)
    assert right == pytest.approx(summary["values"]["accuracy"], abs=1e-6)
    assert main(["predict", "--run", str(run)]) == 0
    with Path("predictions.csv").open() as file:
        assert [row["prediction"] for row in csv.DictReader(file)] == [row["prediction"] for row in rows]
    assert sorted((path.name, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


@pytest.mark.slow
def test_resuming_a_stopped_run_ends_where_it_would_have(trained, capsys, monkeypatch):
    stepped = SparsitySchedule.on_stepped

    def stop(self, step, adapters):
        if step == 6:
            raise RuntimeError("power cut")
        stepped(self, step, adapters)

    monkeypatch.setattr(SparsitySchedule, "on_stepped", stop)
    with pytest.raises(RuntimeError, match="power cut"):
        main(["fit", "--config", "tiny.yaml"])
    monkeypatch.undo()
    monkeypatch.chdir(trained)
    stopped = Path("runs/tiny/002")
    assert torch.load(stopped / "last.ckpt", weights_only=True)["global_step"] == 4
    capsys.readouterr()
    assert main(["fit", "--resume", str(stopped)]) == 0
    assert lines(capsys)[-1] == "run: runs/tiny/002"
    one, two = (load_file(f"runs/tiny/00{n}/adapter/adapter.safetensors") for n in (1, 2))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert {"metrics.1.csv", "metrics.csv"} <= {path.name for path in stopped.iterdir()}
    assert "ckpt_path: null" in (stopped / "config.yaml").read_text()
    first, second = (json.loads(Path(f"runs/tiny/00{n}/summary.json").read_text()) for n in (1, 2))
    assert first["values"] == second["values"]
    assert first["linear_baseline"] == second["linear_baseline"]


@pytest.mark.slow
def test_a_run_that_sigterm_stops_has_not_succeeded(here, capsys, monkeypatch):
    def stop(self, batch, batch_idx):
        if self.trainer.global_step == stopped_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def error(*words):
        assert main(["fit", *words]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    monkeypatch.setattr(AdapterModule, "on_train_batch_start", stop)
    line = ["--config", "tiny.yaml", "--model.linear_baseline", "false"]
    stopped_at = 2
    then = "error: the run was stopped by SIGTERM before its end; it goes on with fit --resume runs/tiny/001"
    assert error(*line) == then
    stopped_at = 5
    assert error("--resume", "runs/tiny/001") == then
    stopped_at = 99
    assert main(["fit", "--resume", "runs/tiny/001"]) == 0
    assert main(["fit", *line]) == 0
    one, two = (load_file(f"runs/tiny/00{n}/adapter/adapter.safetensors") for n in (1, 2))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_stop_before_the_first_batch_leaves_no_folder(here, capsys, monkeypatch):
    """SIGTERM there is noticed behind the batch; Ctrl-C before training begins ends it where it is."""

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterModule, "configure_model", interrupted)
    assert main(["fit", "--config", "tiny.yaml"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: the run in runs/tiny/001 was stopped by Ctrl-C before its first checkpoint; start it again."
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_causal_language_model_on_completions(here, capsys):
    folder = decoder_folder(here / "decoder")
    completion_file(folder / "pairs.csv")
    config = f"""
model: {{pretrained: {folder}, task: causal-lm, method: LoRA, max_new_tokens: 3}}
data:
  class_path: Completions
  init_args: {{train: {folder}/pairs.csv, validation: {folder}/pairs.csv, batch_size: 2}}
trainer: {{max_steps: 6, accumulate_grad_batches: 2, enable_progress_bar: false, accelerator: cpu}}
"""
    Path("lm.yaml").write_text(config)
    assert main(["fit", "--config", "lm.yaml"]) == 0
    summary = json.loads(Path("runs/lm/001/summary.json").read_text())
    assert summary["metric"] == "loss"
    assert summary["linear_baseline"] is None
    assert summary["values"]["loss"] < summary["untrained"]["loss"]
    assert main(["predict", "--run", "runs/lm/001", "--output", "lm.jsonl"]) == 0
    assert {"prompt", "completion", "prediction", "loss"} <= set(
        json.loads(Path("lm.jsonl").read_text().splitlines()[0])
    )


@pytest.mark.slow
def test_words_with_tags(here):
    """Learns that words from w20 on are names; predict gives a tag for each word."""
    rows = [[f"w{3 * i % 40}", f"w{7 * i % 40}", f"w{11 * i % 40}"] for i in range(1, 40)]
    lines = [{"tokens": words, "tags": ["NAME" if int(w[1:]) >= 20 else "O" for w in words]} for words in rows]
    Path("words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = """
model:
  {pretrained: model, task: token-classification, method: LoRA, optimizer: {class_path: AdamW, init_args: {lr: 0.02}}}
data:
  {class_path: TaggedWords, init_args: {train: words.jsonl, validation: words.jsonl, batch_size: 4}}
trainer: {max_steps: 40, accumulate_grad_batches: 2, max_epochs: -1, enable_progress_bar: false, accelerator: cpu}
"""
    Path("tags.yaml").write_text(config)
    assert main(["fit", "--config", "tags.yaml"]) == 0
    summary = json.loads(Path("runs/tags/001/summary.json").read_text())
    assert summary["metric"] == "f1"
    assert summary["linear_baseline"] is not None
    assert summary["values"]["f1"] > summary["linear_baseline"]["f1"] + 0.05
    assert main(["predict", "--run", "runs/tags/001", "--output", "tags.jsonl"]) == 0
    found = [json.loads(line) for line in Path("tags.jsonl").read_text().splitlines()]
    assert all(set(row["prediction"].split()) <= {"NAME", "O"} for row in found)
    assert all(len(row["prediction"].split()) == len(row["tokens"]) for row in found)


def test_a_dry_run_leaves_no_folder(here):
    assert main(["fit", "--config", "tiny.yaml", "--trainer.fast_dev_run", "5"]) == 0
    assert not Path("runs").exists()


ERRORS = {
    "unknown method": (
        ["--model.method", "RosaLoRA"],
        'error: model.method: no method "RosaLoRA". Did you mean "RoseLoRA"? Installed: AdaLoRA, BeamLoRA, CELoRA, ',
    ),
    "blocked plugin": (
        ["-p", "no:ll_rose"],
        "ll_rose.RoseLoRA is part of plugin ll_rose, which is blocked by -p no:ll_rose",
    ),
    "unknown plugin": (["-p", "no:ll_rosa"], 'no plugin "ll_rosa". Did you mean "ll_rose"?'),
    "unknown field": (["--model.method.rnak", "3"], '"rnak". Did you mean "rank"?'),
    "field out of range": (
        ["--model.method.sparsity", "1.2"],
        "error: RoseLoRA.sparsity is 1.2; it must lie in [0, 1).",
    ),
    "unknown callback": (["--trainer.callbacks+", "SparsitySchedul"], 'Did you mean "SparsitySchedule"?'),
    "unknown setting": (["--trainer.max_step", "3"], '"trainer.max_step". Did you mean "trainer.max_steps"?'),
    "rank zero": (["--model.method.rank", "0"], "RoseLoRA.rank is 0; it must be at least 1"),
    "schedule backwards": (
        ["--model.method.start", "0.9", "--model.method.end", "0.2"],
        "RoseLoRA.end is 0.2; it must come after start, which is 0.9",
    ),
    "schedule too long": (["--trainer.max_steps", "3"], "the smallest run that fits has 4 optimizer steps"),
    "target": (["--model.targets", "[qury]"], 'targets=["qury"] matched none of the'),
    "scope": (["--model.targets", "atention"], 'Did you mean "attention"?'),
    "model folder": (["--model.pretrained", "./modle"], 'model.pretrained is "./modle"; no such folder. Nearest: '),
    "task": (["--model.task", "regresion"], 'model.task is "regresion". Did you mean "regression"?'),
    "data file": (["--data.train", "model/trian.csv"], '"model/trian.csv"'),
    "column": (["--data.text", "sentence"], 'LabelledText.text is "sentence"'),
    "trainer": (["--trainer.val_check_interval", "0.5"], "error: trainer: `val_check_interval` should be an integer"),
    "trainer's value": (["--trainer.strategy", "fsdp3"], "error: trainer: You selected an invalid strategy name"),
    "trainer's data": (
        ["--trainer.val_check_interval", "999", "--trainer.check_val_every_n_epoch", "1"],
        "error: trainer: `val_check_interval` (999) must be",
    ),
    "window": (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches is 0; it must be at least 1"),
    "callback's value": (
        ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor=a", "--trainer.callbacks.mode=bad"],
        "error: EarlyStopping: `mode` can be min, max, got bad",
    ),
    "half precision": (["--trainer.precision", "16-true"], 'gradients underflow; take "bf16-true"'),
    "length": (
        ["--data.max_length", "9999"],
        "data.max_length is 9999; BertForSequenceClassification has 512 positions",
    ),
    "labels": (["--model.num_labels", "2"], "model.num_labels is 2; the data have 3 classes"),
    "rate": (
        ["--model.optimizer.lr", "-1"],
        "error: model.optimizer.init_args.lr is -1.0; it must be at least 0. AdamW says",
    ),
    "task of the data": (["--model.task", "regression"], "the data (LabelledText) serve sequence-classification"),
    "config": (["--config", "tiyn.yaml"], 'Did you mean "tiny.yaml"?'),
}


MOST = [pytest.param(case, marks=pytest.mark.slow if number % 2 else ()) for number, case in enumerate(ERRORS)]


@pytest.mark.parametrize("case", MOST)
def test_bad_input_is_one_line_and_exit_code_2(here, capsys, case):
    flags, message = ERRORS[case]
    assert main(["fit", "--config", "tiny.yaml", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert error[-1].startswith("error: ")
    assert not any("Traceback" in line for line in error)
    assert not Path("runs").exists()


def test_an_unknown_label_and_an_empty_split(here, capsys):
    (here / "model" / "dev.csv").write_text("text,label\nw1 w2,c0\nw3,c7\n")
    assert main(["fit", "--config", "tiny.yaml"]) == 2
    assert "c7" in capsys.readouterr().err
    (here / "model" / "dev.csv").write_text("text,label\n")
    assert main(["fit", "--config", "tiny.yaml"]) == 2
    assert "dev.csv" in capsys.readouterr().err


def test_an_unwritable_output(here, capsys):
    Path("runs").write_text("a file where a folder must be")
    assert main(["fit", "--config", "tiny.yaml"]) == 2
    assert 'cannot make the run folder "runs/tiny/001"' in capsys.readouterr().err


def test_a_diverging_run_says_so(here, capsys):
    code = main(["fit", "--config", "tiny.yaml", "--model.optimizer.lr", "1e30", "--model.linear_baseline", "false"])
    assert code == 2
    assert "not a number at optimizer step" in capsys.readouterr().err


def test_predictions_need_a_known_ending(trained, capsys):
    assert main(["predict", "--run", "runs/tiny/001", "--output", "out.txt"]) == 2
    assert '--output is "out.txt"; it must end in .csv or .jsonl' in capsys.readouterr().err


@pytest.mark.slow
def test_last_ckpt_is_the_state_of_the_adapter_whatever_the_validation_interval(here, capsys):
    for number, flags in enumerate((["--trainer.max_steps", "10"], ["--trainer.val_check_interval", "9"]), start=1):
        assert main(["fit", "--config", "tiny.yaml", *flags]) == 0
        run = Path(f"runs/tiny/00{number}")
        summary = json.loads((run / "summary.json").read_text())
        checkpoint = torch.load(run / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == summary["steps"]
        adapter = load_file(run / "adapter" / "adapter.safetensors")
        assert {key.removeprefix("net.") for key in checkpoint["state_dict"]} == set(adapter)
        assert all(torch.equal(value, adapter[key[4:]]) for key, value in checkpoint["state_dict"].items())


@pytest.mark.slow
def test_a_run_without_validation_data(here, capsys):
    flags = ["--data.validation", "null", "--data.validation_fraction", "0", "--trainer.val_check_interval", "1"]
    assert main(["fit", "--config", "tiny.yaml", *flags]) == 0
    assert json.loads(Path("runs/tiny/001/summary.json").read_text())["values"] == {}
    assert main(["fit", "--config", "tiny.yaml", "--trainer.limit_val_batches", "0"]) == 0
    assert json.loads(Path("runs/tiny/002/summary.json").read_text())["untrained"] == {}


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_untrained_weights_are_not_measured_in_silence(here, capsys, verb):
    assert main([verb, "--config", "tiny.yaml"]) == 2
    assert f"{verb}: no trained weights given; --run FOLDER takes a run's" in capsys.readouterr().err


def test_a_finished_run_is_not_resumed(trained, capsys):
    before = bytes_in("runs/tiny/001")
    assert main(["fit", "--resume", "runs/tiny/001"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        "the run has finished, with 8 optimizer steps (trainer.max_steps is 8); its adapter is runs/tiny/001" in error
    )
    assert error.endswith("To go on, give more: fit --resume runs/tiny/001 --trainer.max_steps 16")
    assert bytes_in("runs/tiny/001") == before


REFUSED = {
    "another rate": ["--model.optimizer.lr", "0.02"],
    "another rank": ["--model.method.rank", "3"],
    "another length": ["--trainer.max_steps", "12"],
    "another model": ["--model.pretrained", "gone"],
    "a file that is not there": ["--data.train", "model/gone.csv"],
    "a setting that is none": ["--trainer.max_step", "12"],
    "a callback without what it needs": ["--trainer.callbacks+", "RankPruning", "--trainer.callbacks.final_rank", "1"],
    "other targets": ["--model.targets", "[key]"],
    "no steps": ["--trainer.max_steps", "0"],
    "other rows": ["--data.train", "model/dev.csv", "--data.limit", "20"],
    "as many other rows": ["--data.train", "model/others.csv"],
    "another length of texts": ["--data.max_length", "8"],
    "another order": ["--data.seed", "1"],
}


@pytest.fixture(scope="module")
def stopped(prepared, tmp_path_factory):
    """What a fit leaves that was stopped behind its fifth step."""

    def stop(self, batch, batch_idx):
        if self.trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    place = tmp_path_factory.mktemp("stopped")
    shutil.copytree(prepared, place, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(AdapterModule, "on_train_batch_start", stop)
        assert main(["fit", "--config", "tiny.yaml", "--model.linear_baseline", "false"]) == 2
    return place / "runs"


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_resume_changes_no_byte_of_the_run(here, stopped, case):
    """So that the same run can go on afterwards as it was."""
    shutil.copytree(stopped, here / "runs")
    labelled_file(here / "model" / "others.csv", rows=40, seed=7)
    before = bytes_in("runs")
    assert main(["fit", "--resume", "runs/tiny/001", *REFUSED[case]]) == 2
    assert bytes_in("runs") == before


GOING_ON = """
seed_everything: 5
model:
  pretrained: model
  method: {class_path: LoRA, init_args: {rank: 2, dropout: 0.1}}
  optimizer: {class_path: AdamW, init_args: {lr: 1.0e-2}}
  lr_scheduler: {decay: constant, warmup_fraction: 0}
  linear_baseline: false
data: {class_path: LabelledText, init_args: {train: model/train.csv, validation: model/dev.csv, batch_size: 4}}
trainer: {max_epochs: -1, log_every_n_steps: 1, enable_progress_bar: false, accelerator: cpu}
"""


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 10])
def test_a_finished_run_goes_on_with_more_steps_as_if_it_had_not_ended(here, capsys, steps):
    """In the middle of an epoch of ten batches and at its end; the rate is the same all along."""
    Path("on.yaml").write_text(GOING_ON)
    assert main(["fit", "--config", "on.yaml", "--trainer.max_steps", "14"]) == 0
    assert main(["fit", "--config", "on.yaml", "--trainer.max_steps", str(steps)]) == 0
    assert main(["fit", "--resume", "runs/on/002", "--trainer.max_steps", "14"]) == 0
    assert f"resume: the run had ended and goes on from step {steps} to 14" in capsys.readouterr().out
    one, two = (load_file(f"runs/on/00{n}/adapter/adapter.safetensors") for n in (1, 2))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert yaml.safe_load(Path("runs/on/002/config.yaml").read_text())["trainer"]["max_steps"] == 14
    assert main(["fit", "--resume", "runs/on/002", "--trainer.max_steps", "9"]) == 2


@pytest.mark.slow
def test_a_run_that_a_callback_ended_goes_on(here, capsys):
    """EarlyStopping and max_time end a run before its steps are done; with more steps, or with its own, it goes on."""
    Path("on.yaml").write_text(GOING_ON)
    stop = [
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=val_loss",
        "--trainer.callbacks.mode=min",
    ]
    always = ["--trainer.callbacks.divergence_threshold=0.0"]  # stops at the first validation
    never = ["--trainer.callbacks.divergence_threshold=null"]
    line = ["fit", "--config", "on.yaml", "--trainer.max_steps", "14", *stop]
    assert main([*line, *always]) == 0
    assert json.loads(Path("runs/on/001/summary.json").read_text())["steps"] == 10
    assert main(["fit", "--resume", "runs/on/001", *never, "--trainer.max_steps", "20"]) == 0
    assert json.loads(Path("runs/on/001/summary.json").read_text())["steps"] == 20


def bytes_in(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_another_setting_with_a_run_is_refused(trained, capsys):
    assert main(["validate", "--run", "runs/tiny/001", "--model.method.alpha", "200"]) == 2
    assert "RoseLoRA.alpha is 200.0; the checkpoint was trained with 16.0" in capsys.readouterr().err


@pytest.mark.slow
def test_config_yaml_lies_in_the_run_folder_whatever_the_logger(here):
    flags = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"]
    assert main(["fit", "--config", "tiny.yaml", *flags]) == 0
    assert {"config.yaml", "metrics.csv", "summary.json"} <= {path.name for path in Path("runs/tiny/001").iterdir()}
    assert list(Path("logs").rglob("metrics.csv"))
    assert main(["validate", "--run", "runs/tiny/001"]) == 0


def test_a_checkpoint_callback_of_the_users_stands_beside_ours_and_the_baseline_can_be_turned_off(here):
    flags = ["--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.filename", "mine"]
    assert main(["fit", "--config", "tiny.yaml", *flags, "--model.linear_baseline", "false"]) == 0
    names = {path.name for path in Path("runs/tiny/001").rglob("*.ckpt")}
    assert names == {"last.ckpt", "mine.ckpt"}
    summary = json.loads(Path("runs/tiny/001/summary.json").read_text())
    assert summary["linear_baseline"] is None
    assert summary["untrained"]["accuracy"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["rose", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lorasc", "tasks/chat", "shapes/llama_2_7b"))]
)
@pytest.mark.parametrize("how", ["comments", "comments,skip_default"])
def test_a_printed_config_with_comments_is_the_same_config(name, how, tmp_path, capsys, monkeypatch):
    """Its comments are the documentation of the fields; printed again from what was printed, it is the same."""
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", name, f"--print_config={how}"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ *# .*folder, hub id, .pkg:IMPORT_NAME/FOLDER. for weights", text, re.MULTILINE)
    assert re.search(r"^ *# .*(Inner width|Numerator of the scaling|[Ss]hare)", text, re.MULTILINE)
    assert ("accumulate_grad_batches" in text) == (how == "comments")
    Path("printed.yaml").write_text(text)
    assert main(["fit", "--config", name, "--print_config"]) == 0
    plain = capsys.readouterr().out
    assert main(["fit", "--config", "printed.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(plain)
    assert not Path("runs").exists()
