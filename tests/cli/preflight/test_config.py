"""The config check: each kind of mistake is named, all of them at once, and nothing is loaded or written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_lightning.cli.preflight import machine


def test_nothing_is_wrong_with_a_sound_config(checked):
    found = checked({})
    assert found.problems == []
    assert found.notes == []
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_nothing_is_wrong_with_a_strategy_that_runs_here(checked, name):
    assert checked({"trainer.devices": 2}, "--config", f"strategies/{name}").problems == []


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
            "model.optimizer.init_args.lr is -1.0; it must be at least 0",
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


@pytest.mark.parametrize("case", CASES)
def test_every_mistake_is_one_line(case, checked):
    changes, expected = CASES[case]
    if "int8" in str(changes):
        pytest.importorskip("bitsandbytes")
    found = checked(changes)
    listing = "\n".join(found.problems)
    for text in expected:
        assert sum(text in problem for problem in found.problems) == 1, f"{text!r} in\n{listing}"
    assert len(found.problems) == len(expected), listing
    assert not any("\n" in problem for problem in found.problems)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with a GPU these strategies may work")
def test_strategies_that_need_what_is_not_here(checked):
    found = checked(
        {"trainer": {"accelerator": "gpu", "devices": 4, "strategy": {"class_path": "FSDP1"}, "max_steps": 8}}
    )
    assert any("gpu" in problem.lower() for problem in found.problems), found.problems
    assert all(problem.startswith("trainer: ") for problem in found.problems)
    assert machine.strategies()["fsdp"]
    assert "deepspeed" in machine.strategies()["deepspeed"].lower()


def test_flags_are_looked_at_like_configs(checked):
    found = checked({}, "--data.batch_size", "0", "--model.method.init_args.rank=0")
    assert sorted(problem.split(";")[0] for problem in found.problems) == [
        "LabelledText.batch_size is 0",
        "RoseLoRA.rank is 0",
    ]


@pytest.fixture
def started(model_folder, tmp_path):
    """A folder with an adapter of rank 2 on the sound config's model, of classes c0, c1 and c2."""
    import lora_lightning as ll
    from ll_rose import RoseLoRA
    from lora_lightning.models.loading import load_model
    from lora_lightning.models.tasks import find_task

    net = load_model(str(model_folder), find_task("sequence-classification"), 3, label_names=["c0", "c1", "c2"])
    ll.inject(net, RoseLoRA(rank=2, sparsity=0.25), ["query", "value"])
    return str(ll.save_adapter(net, tmp_path / "started"))


def test_an_adapter_to_train_on_is_told_and_fits(checked, started):
    found = checked({"model.adapter": started, "model.targets": None, "model.method": None})
    assert found.problems == []
    assert f'model.adapter: trains on from "{started}" (RoseLoRA, lora_lightning, sha256 ' in found.notes[0]
    assert checked({"model.adapter": started}).problems == []  # the same targets and rank, another schedule
    on_top = checked({"model.adapter": [started]})
    assert on_top.problems == []
    assert "trains on top of" in on_top.notes[0]


def test_settings_and_data_that_do_not_fit_the_adapter_to_train_on(checked, started, model_folder):
    from toy_runs import labelled_file

    changes = {"model.adapter": started, "model.method.init_args": {"rank": 4}, "model.targets": ["query"]}
    changes["data.init_args.train"] = str(labelled_file(model_folder / "five.csv", labels=5))
    said = checked(changes).problems
    wanted = ["model.method.rank is 4, but", "A head of other classes starts anew", "model.targets means 2 layers, but"]
    assert len(said) == len(wanted), said
    for one in wanted:
        assert any(one in text for text in said), (one, said)


def test_a_folder_that_is_no_adapter_to_train_on(checked, tmp_path):
    said = checked({"model.adapter": str(tmp_path)}).problems
    assert any("holds neither adapter.safetensors nor adapter_config.json" in text for text in said), said
