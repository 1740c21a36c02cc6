"""A run is validated, talked to and exported from a directory that it was not started in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from toy_runs import completion_file, decoder_folder

from lora_lightning.cli.main import main
from lora_lightning.cli.run_paths import as_given, located


@pytest.mark.slow
def test_a_run_on_an_adapter_named_by_a_relative_path_works_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    decoder_folder(tmp_path / "decoder")
    completion_file(tmp_path / "pairs.csv")
    data = {"train": "pairs.csv", "validation": "pairs.csv", "predict": ["pairs.csv"], "batch_size": 4}
    settings = {
        "model": {
            "pretrained": "decoder",
            "task": "causal-lm",
            "method": {"class_path": "LoRA", "init_args": {"rank": 2}},
            "max_new_tokens": 2,
        },
        "data": {"class_path": "Completions", "init_args": data},
        "trainer": {"max_steps": 2, "logger": False, "accelerator": "cpu", "enable_progress_bar": False},
    }
    Path("it.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", "it.yaml"]) == 0
    for adapter in ("runs/it/001", "[runs/it/001]"):
        assert main(["fit", "--config", "it.yaml", "--model.adapter", adapter]) == 0
    runs = ["runs/it/001", "runs/it/002", "runs/it/003"]
    for number, run in enumerate(runs):
        assert main(["predict", "--run", run, "--output", f"{number}.csv"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("asked.jsonl").write_text(json.dumps({"prompt": "w1 w2"}) + "\n")
    capsys.readouterr()
    for number, run in enumerate(runs):
        assert main(["predict", "--run", f"../{run}", "--output", f"{number}.csv"]) == 0
        assert "left out" not in capsys.readouterr().out
        assert Path(f"{number}.csv").read_text() == Path(f"../{number}.csv").read_text()
        assert main(["generate", f"../{run}", "--input", "asked.jsonl", "--output", f"{number}.jsonl"]) == 0
        form = "merged" if number == 2 else "peft"
        assert main(["export", f"../{run}", "--format", form, "--output", f"out{number}"]) == 0
    monkeypatch.chdir(tmp_path)
    for number, run in enumerate(runs):
        assert main(["generate", run, "--input", "elsewhere/asked.jsonl", "--output", f"{number}.jsonl"]) == 0
        assert Path(f"{number}.jsonl").read_text() == Path(f"elsewhere/{number}.jsonl").read_text()
    shutil.rmtree("decoder")
    assert main(["validate", "--run", runs[0]]) == 2
    assert "decoder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_goes_on_from_another_directory_is_the_one_that_goes_on_where_it_was_begun(tmp_path, monkeypatch):
    """The same weights and files, names of files as the run was given them, so that the directory can be moved."""
    begun = tmp_path / "begun"
    begun.mkdir()
    monkeypatch.chdir(begun)
    decoder_folder(begun / "decoder")
    completion_file(begun / "pairs.csv")
    settings = {
        "model": {"pretrained": "decoder", "task": "causal-lm", "method": {"class_path": "LoRA"}},
        "data": {
            "class_path": "Completions",
            "init_args": {"train": {"pairs.csv": 1.0}, "validation": "pairs.csv", "batch_size": 4},
        },
        "trainer": {
            "max_steps": 2,
            "logger": True,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "Samples", "init_args": {"prompts": "asked.jsonl", "every_n_steps": 1}}],
        },
    }
    Path("asked.jsonl").write_text(json.dumps({"prompt": "w1 w2"}) + "\n")
    Path("it.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", "it.yaml"]) == 0
    shutil.copytree(begun, tmp_path / "elsewhere")
    resume = ["--trainer.max_steps", "4"]
    assert main(["fit", "--resume", "runs/it/001", *resume]) == 0
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    assert main(["fit", "--resume", "../elsewhere/runs/it/001", *resume]) == 0
    one, other = (tmp_path / name / "runs/it/001" for name in ("begun", "elsewhere"))
    assert (one / "config.yaml").read_text() == (other / "config.yaml").read_text()
    assert "pretrained: decoder\n" in (other / "config.yaml").read_text()
    for file in ("adapter.safetensors", "adapter.json"):
        assert (one / "adapter" / file).read_bytes() == (other / "adapter" / file).read_bytes()
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    assert list(Path().iterdir()) == []
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    assert main(["fit", "--resume", "../moved/runs/it/001", "--trainer.max_steps", "6"]) == 0
    assert main(["validate", "--run", "../moved/runs/it/001"]) == 0


def test_texts_of_settings_that_name_files(tmp_path, monkeypatch):
    run = tmp_path / "start/runs/it/001"
    run.mkdir(parents=True)
    (tmp_path / "start/a").mkdir()
    data = {"train": {"a": 1.0, "b": 2.0}, "tokenizer": "a", "messages": "a"}
    settings = {
        "trainer": {"default_root_dir": None, "callbacks": [{"class_path": "Samples", "init_args": {"prompts": "a"}}]},
        "model": {"pretrained": "a", "adapter": ["a", "b"], "task": "a"},
        "data": {"class_path": "Chat", "init_args": data},
    }
    file = run / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    there = str(tmp_path / "start/a")
    for config in (str(file), file.read_text()):
        found = yaml.safe_load(located(config, run))
        assert found["model"] == {"pretrained": there, "adapter": [there, "b"], "task": "a"}
        assert found["data"]["init_args"] == {"train": {there: 1.0, "b": 2.0}, "tokenizer": there, "messages": "a"}
        assert found["trainer"]["callbacks"][0]["init_args"] == {"prompts": there}
        assert as_given(Namespace(found).clone(), run)["model"]["pretrained"] == "a"
        assert as_given(Namespace(found), tmp_path) == Namespace(found)
    monkeypatch.chdir(tmp_path / "start")
    assert located(str(file), run) == str(file)
