"""A run is validated, talked to and exported from a directory that it was not started in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from toy_runs import completion_file, decoder_folder

from lora_lightning.cli.main import main
from lora_lightning.cli.run_paths import located


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


def test_texts_of_settings_that_name_files(tmp_path, monkeypatch):
    run = tmp_path / "start/runs/it/001"
    run.mkdir(parents=True)
    (tmp_path / "start/a").mkdir()
    data = {"train": {"a": 1.0, "b": 2.0}, "tokenizer": "a", "messages": "a"}
    settings = {
        "trainer": {"default_root_dir": None},
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
    monkeypatch.chdir(tmp_path / "start")
    assert located(str(file), run) == str(file)
