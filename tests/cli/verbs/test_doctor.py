"""`doctor` on tiny configs: each kind of mistake is named, all of them at once, and nothing is loaded or written."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from toy_runs import encoder_folder, labelled_file

from lora_lightning import hookimpl, plugins
from lora_lightning.cli.main import main
from lora_lightning.cli.preflight import machine
from lora_lightning.cli.preflight.config import check_config
from lora_lightning.errors import ModelError
from lora_lightning.models.pretrained import check_weights
from lora_lightning.registry import Component


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = encoder_folder(tmp_path_factory.mktemp("doctor") / "model")
    labelled_file(path / "train.csv", rows=40)
    return path


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A function that writes a sound config with some values changed, and says what `check_config` finds in it."""
    monkeypatch.chdir(tmp_path)
    plugins.load()

    def check(changes, *flags):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config(folder, changes)))
        return check_config(["--config", str(path), *flags])

    return check


def config(folder, changes):
    sound = {
        "model": {
            "pretrained": str(folder),
            "method": {"class_path": "RoseLoRA", "init_args": {"rank": 2, "sparsity": 0.5}},
            "targets": ["query", "value"],
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-2}},
        },
        "data": {"class_path": "LabelledText", "init_args": {"train": f"{folder}/train.csv", "batch_size": 4}},
        "trainer": {"max_steps": 8, "max_epochs": -1, "accelerator": "cpu"},
    }
    changed = copy.deepcopy(sound)
    for key, value in changes.items():
        node = changed
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return changed


def test_nothing_is_wrong_with_a_sound_config(here):
    found = here({})
    assert found.problems == []
    assert found.notes == []
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_nothing_is_wrong_with_a_strategy_that_runs_here(here, name):
    assert here({"trainer.devices": 2}, "--config", f"strategies/{name}").problems == []


CASES = {
    "wrong values, several in one class": (
        {
            "model.method.init_args": {"rank": 4, "sparsity": 1.2, "beta": 3},
            "model.optimizer.init_args.lr": -1.0,
            "data.init_args.batch_size": 0,
            "data.init_args.validation_fraction": 2.0,
            "trainer.val_check_interval": -3,
        },
        [
            "RoseLoRA.sparsity is 1.2; it must lie in",
            "RoseLoRA.beta is 3.0; it must lie in",
            "optimizer: Invalid learning rate: -1.0",
            "LabelledText.batch_size is 0; it must be at least 1",
            "LabelledText.validation_fraction is 2.0; it must lie in",
            "val_check_interval",
        ],
    ),
    "files": (
        {"model.pretrained": "./no-model", "data.init_args.train": "no.csv", "data.init_args.tokenizer": "./no-tok"},
        [
            'model.pretrained is "./no-model"; no such folder',
            'data.tokenizer is "./no-tok"; no such folder',
            'LabelledText.train is "no.csv"; no such file',
        ],
    ),
    "columns and lengths": (
        {"data.init_args.text": "txt", "data.init_args.max_length": 5000},
        ['"txt"; train.csv has the columns text, label. Did you mean "text"', "data.max_length is 5000"],
    ),
    "what the model has not": (
        {
            "model.targets": ["query", "valeu"],
            "model.exclude": ["layer.7"],
            "model.overrides": {"layer.9": {"rank": 1}, "layer.0": {"rnak": 1}},
            "model.also_train": ["classifier", "nowhere"],
        },
        [
            'targets=["valeu"] matched none of the',
            'exclude=["layer.7"] matched none of the',
            'overrides: "layer.9" matches none of the',
            'overrides["layer.0"]',
            'also_train: "nowhere" matches no parameter',
        ],
    ),
    "schedules": (
        {
            "model.method.init_args.end": 900,
            "trainer.callbacks": [
                {"class_path": "Cascade", "init_args": {"stage_steps": 4}},
                {"class_path": "RankPruning", "init_args": {"final_rank": 1, "start": 0.9, "end": 0.5}},
            ],
        },
        [
            "SparsitySchedule.end is step 900; the run has 8 steps, so it must be at most 8",
            "Cascade starts adapters again at each stage",
            "RankPruning.start is 0.9 and end is 0.5",
            "RankPruning found nothing to act on",
        ],
    ),
    "task and data": (
        {"model.task": "regresion", "model.random_config": {"hidden_size": 4}},
        ["model.random_config", '"regresion"'],
    ),
    "precision and sharding": (
        {"trainer.precision": "16-true", "trainer.strategy": {"class_path": "FSDP2"}, "model.quantization": "int8"},
        ['model.quantization is "int8" and trainer.strategy is "FSDP2"', 'trainer.precision is "16-true"'],
    ),
    "sharding": ({"trainer.strategy": {"class_path": "FSDP2"}}, []),
    "sharding on the CPU": (
        {"trainer.strategy": {"class_path": "FSDP2", "init_args": {"cpu_offload": True}}, "trainer.accelerator": "cpu"},
        ["trainer.strategy is FSDP2 with cpu_offload, but steps are taken on the CPU"],
    ),
}


UNPARSED = {
    "unknown keys": (
        {"model.optimzer": "AdamW", "data.init_args.batch_sise": 4, "trainer.max_step": 3, "modle.targets": ["query"]},
        [
            'LabelledText has no "batch_sise". Did you mean "batch_size"',
            'no setting "model.optimzer". Did you mean "model.optimizer"',
            'no setting "trainer.max_step". Did you mean "trainer.max_steps"',
            'no setting "modle.targets". Did you mean "model.targets"',
        ],
    ),
    "unknown classes, of a list the right ones": (
        {
            "model.method": {"class_path": "RosaLoRA", "init_args": {"rank": 2}},
            "data.class_path": "LabeledText",
            "trainer.callbacks": ["KeepBst", {"class_path": "RankPruning"}, {"class_path": "SparsitySchedul"}],
            "trainer.logger": "CSVLoger",
            "trainer.strategy": "ddp",
            "trainer.profiler": "simple",
            "model.optimizer": "adamw.AdamW",
        },
        [
            'data: no data module "LabeledText". Did you mean "LabelledText"',
            'model.method: no method "RosaLoRA". Did you mean "RoseLoRA"',
            'trainer.callbacks: no callback "KeepBst". Did you mean "KeepBest"',
            'trainer.callbacks: no callback "SparsitySchedul". Did you mean "SparsitySchedule"',
            'trainer.logger: no logger "CSVLoger". Did you mean "CSVLogger"',
        ],
    ),
    "one wrong type, and files": (
        {
            "trainer.max_steps": "many",
            "model.pretrained": "./no-model",
            "data.init_args.train": "no.csv",
            "data.init_args.validation": "owner/on-the-hub",
            "data.init_args.test": ["one.csv", "builtin:nothing"],
            "data.init_args.tokenizer": "./no-tok",
        },
        [
            'trainer.max_steps is "many"; it must be a whole number',
            'model.pretrained is "./no-model"; no such folder',
            'data.tokenizer is "./no-tok"; no such folder',
            'data.train is "no.csv"; no such file',
            'data.test is "one.csv"; no such file',
            'data.test is "builtin:nothing"',
        ],
    ),
}


@pytest.mark.parametrize("case", UNPARSED)
def test_what_cannot_be_parsed_shows_the_first_reason_and_what_is_known_without(case, here):
    changes, expected = UNPARSED[case]
    found = here(changes)
    listing = "\n".join(found.problems)
    assert found.problems[0].startswith(expected[0]) or expected[0] in found.problems[0], listing
    for text in expected:
        assert sum(text in problem for problem in found.problems) == 1, f"{text!r} in\n{listing}"
    assert len(found.problems) == len(expected), listing
    assert found.notes == [LATER]


LATER = "the rest of the config is checked once this can be parsed"


@pytest.mark.parametrize("case", CASES)
def test_every_mistake_is_one_line(case, here):
    changes, expected = CASES[case]
    if "int8" in str(changes):
        pytest.importorskip("bitsandbytes")
    found = here(changes)
    listing = "\n".join(found.problems)
    for text in expected:
        assert sum(text in problem for problem in found.problems) == 1, f"{text!r} in\n{listing}"
    assert len(found.problems) == len(expected), listing
    assert not any("\n" in problem for problem in found.problems)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with a GPU these strategies may work")
def test_strategies_that_need_what_is_not_here(here):
    found = here({"trainer": {"accelerator": "gpu", "devices": 4, "strategy": {"class_path": "FSDP1"}, "max_steps": 8}})
    assert any("gpu" in problem.lower() for problem in found.problems), found.problems
    assert all(problem.startswith("trainer: ") for problem in found.problems)
    assert machine.strategies()["fsdp"]
    assert "deepspeed" in machine.strategies()["deepspeed"].lower()


def test_flags_are_looked_at_like_configs(here):
    words = ["--model.rnk", "3", "--trainer.max_steps=many", "--data.train", "no.csv", "--model.method", "RosaLoRA"]
    found = here({}, *words)
    first, *others = found.problems
    assert first.startswith('trainer.max_steps is "many"; it must')
    starts = ['data.train is "no.csv"; no such', 'model.method: no method "RosaLoRA"', 'no setting "model.rnk". Did']
    assert all(problem.startswith(start) for problem, start in zip(sorted(others), starts, strict=True)), others
    found = here({}, "--data.batch_size", "0", "--model.method.init_args.rank=0")
    assert sorted(problem.split(";")[0] for problem in found.problems) == [
        "LabelledText.batch_size is 0",
        "RoseLoRA.rank is 0",
    ]


def test_what_is_required_is_named(here, tmp_path):
    (tmp_path / "empty.yaml").write_text("trainer: {max_steps: 4}\n")
    found = check_config(["--config", "empty.yaml"])
    assert len(found.problems) == 1
    keys, _, advice = found.problems[0].partition(" are required: ")
    assert sorted(keys.split(", ")) == ["data", "model.method", "model.pretrained"]
    assert advice.startswith("give them in a config (--config NAME; there are: ")


def test_a_config_that_is_no_yaml_says_so_and_that_more_was_not_checked(here, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: {pretrained: [\n")
    found = check_config(["--config", "broken.yaml"])
    assert len(found.problems) == 1
    assert "not valid YAML" in found.problems[0]
    assert found.notes == [LATER]


def test_five_mistakes_show_in_two_runs(folder, tmp_path, monkeypatch, capsys):
    """First what keeps the config from being parsed and what is known even so, then the others."""
    monkeypatch.chdir(tmp_path)
    changes = {
        "model.targets": ["query", "valeu"],
        "model.method.init_args.sparsity": 1.2,
        "model.optimzer": "AdamW",
        "data.init_args.train": "nowhere.csv",
        "trainer.max_steps": "many",
    }
    for words in (("optimzer", "nowhere.csv", "many"), ("valeu", "1.2")):
        Path("five.yaml").write_text(yaml.safe_dump(config(folder, changes)))
        assert main(["doctor", "five.yaml"]) == 1
        out = capsys.readouterr().out
        problems = [line for line in out.splitlines() if line.startswith("problem: ")]
        assert len(problems) == len(words), "\n".join(problems)
        assert out.endswith(f"{len(words)} problems found with this machine and this config.\n")
        for text in words:
            assert sum(text in problem for problem in problems) == 1
        changes = {key: value for key, value in changes.items() if key.startswith(("model.targets", "model.method"))}
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert any(row.startswith(f"torch {torch.__version__} ") for row in rows)
    assert any(re.match(r"ll_rose loaded RoseLoRA", row) for row in rows)
    assert any(row.startswith("ddp yes") for row in rows)
    assert any(row.startswith("nf4 on cpu ") for row in rows)


def test_the_machine_alone(capsys, monkeypatch):
    monkeypatch.setattr(machine, "strategies", lambda: {"ddp": "", "other": "no reason"})
    monkeypatch.setattr(machine, "versions", lambda: [machine.Version("one", "1.0", ">=2")])
    assert main(["doctor", "-p", "no:ll_rose"]) == 1
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "ll_rose blocked -" in rows
    assert "other no no reason" in rows
    assert rows[-2:] == ["problem: one is 1.0; needed: >=2.", "1 problem found with this machine."]


def test_a_plugin_that_fails_is_a_problem(capsys, monkeypatch):
    """When it is loaded, or when it is asked for what needs torch."""

    class Later:
        @hookimpl
        def lora_lightning_base_layers(self):
            raise ImportError("no layer")

    broken = plugins.load()
    monkeypatch.setitem(broken.components, "Late", Component("Late", "optimizer", "no_such_module:Late", "ll_late"))
    broken.manager.register(Later(), name="ll_later")
    broken.failed["ll_broken"] = ImportError("no such thing")
    monkeypatch.setattr(plugins, "load", lambda blocked=(): broken)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem: plugin ll_broken failed: ImportError: no such thing\n" in out
    assert "problem: plugin ll_late failed: ModuleNotFoundError: No module named 'no_such_module'\n" in out
    assert "problem: plugin ll_later failed: ImportError: no layer\n" in out


@pytest.mark.parametrize(
    ("installed", "extra", "problem"),
    [
        ("2.5", "", None),
        ("3.0rc1", "", "pack is 3.0rc1; needed: <3,>=2."),
        (None, "", "pack is not installed; needed: <3,>=2."),
        (None, "quant", None),
        ("1.0", "quant", "pack is 1.0; needed: <3,>=2."),
    ],
)
def test_versions_are_judged(installed, extra, problem):
    assert machine.Version("pack", installed, "<3,>=2", extra).problem == problem


def test_the_required_packages_are_those_of_the_distribution():
    found = {version.name: version for version in machine.versions()}
    assert found["torch"].extra == ""
    assert found["torchao"].extra == "quant"
    assert "pytest" not in found
    assert found["lightning"].tested == "2.6.6"


def test_weights_that_are_missing(folder, tmp_path):
    check_weights(str(folder))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds no model\.safetensors\.$"):
        check_weights(str(model))
    (model / "pytorch_model.bin").write_text("")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which is never opened"):
        check_weights(str(model))
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (model / "one.safetensors").write_text("")
    with pytest.raises(ModelError, match=r"1 of its 2 files of weights are missing, such as two\.safetensors"):
        check_weights(str(model))
    index.write_text("[]")
    with pytest.raises(ModelError, match=r"index\.json cannot be read"):
        check_weights(str(model))
