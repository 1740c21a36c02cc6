"""A run is validated, talked to and exported from a directory that it was not started in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace
from safetensors.torch import load_file
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


TEMPLATE = (
    "{% for m in messages %}{{ ('w1 ' if m.role == 'user' else 'w2 ') + m.content + ' [EOS] ' }}{% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A directory with models and data, and a function that fits a config there for two steps."""
    monkeypatch.chdir(tmp_path)
    Path("begun").mkdir()
    monkeypatch.chdir(tmp_path / "begun")
    decoder_folder(Path("decoder"))
    completion_file(Path("pairs.csv"))
    Path("asked.jsonl").write_text(json.dumps({"prompt": "w1 w2"}) + "\n")
    Path("template.jinja").write_text(TEMPLATE)
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    Path("turns.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 8))

    def fit(name, data, model, callbacks=None):
        settings = {
            "model": {"pretrained": "decoder", "task": "causal-lm", "method": {"class_path": "LoRA"}, **model},
            "data": data,
            "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "callbacks": callbacks},
        }
        Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
        assert main(["fit", "--config", f"{name}.yaml"]) == 0

    return fit


COMPLETIONS = {
    "class_path": "Completions",
    "init_args": {"train": {"pairs.csv": 1.0}, "validation": "pairs.csv", "batch_size": 4},
}
CONVERSATIONS = {
    "class_path": "Chat",
    "init_args": {
        "train": "turns.jsonl",
        "validation": "turns.jsonl",
        "chat_template": "template.jinja",
        "batch_size": 4,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "model", "callbacks"),
    [
        (COMPLETIONS, {}, [{"class_path": "Samples", "init_args": {"prompts": "asked.jsonl", "every_n_steps": 1}}]),
        (COMPLETIONS, {"adapter": "runs/first/001"}, None),
        (COMPLETIONS, {"adapter": ["runs/first/001"]}, None),
        (CONVERSATIONS, {}, None),
    ],
    ids=["samples", "an adapter to go on from", "an adapter below", "a template in a file"],
)
def test_a_run_that_goes_on_from_another_directory_is_the_one_that_goes_on_where_it_was_begun(
    begun, tmp_path, monkeypatch, data, model, callbacks
):
    """The same weights and files, names of files as the run was given them, so that the directory can be moved."""
    if model:
        begun("first", COMPLETIONS, {})
    begun("it", data, model, callbacks)
    shutil.copytree(tmp_path / "begun", tmp_path / "elsewhere")
    resume = ["--trainer.max_steps", "4"]
    assert main(["fit", "--resume", "runs/it/001", *resume]) == 0
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    assert main(["fit", "--resume", "../elsewhere/runs/it/001", *resume]) == 0
    one, other = (tmp_path / name / "runs/it/001" for name in ("begun", "elsewhere"))
    assert (one / "config.yaml").read_text() == (other / "config.yaml").read_text()
    assert "pretrained: decoder\n" in (other / "config.yaml").read_text()
    ours, theirs = (load_file(run / "adapter/adapter.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    stated = [json.loads((run / "adapter/adapter.json").read_text()) for run in (one, other)]
    for description in stated:
        for below in description.get("below", ()):
            del below["source"]  # absolute
    assert stated[0] == stated[1]
    for file in ("adapter/README.md", *(["samples.jsonl"] if callbacks else [])):
        assert (one / file).read_text() == (other / file).read_text()
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
