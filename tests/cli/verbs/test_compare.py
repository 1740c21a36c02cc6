from __future__ import annotations

import argparse
import importlib.util

import comparisons
import pytest

from lora_lightning.cli import configs
from lora_lightning.cli.main import main
from lora_lightning.cli.verbs.compare import (
    add_arguments,
    arms_file,
    check_same,
    checked_options,
    joined,
    new_folder,
    own_folder,
    with_options,
)
from lora_lightning.errors import LoraLightningError, RunFolderError, SettingsError


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "LoRA"], "there are no two arms; name them with --methods, --vary or a file of arms"),
        (["--methods", "LoRA,Lora"], 'there is no method "Lora". Did you mean "LoRA"?'),
        (["--methods", "LoRA,linear", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["--methods", "LoRA,linear", "--pruner", "medan"], 'Did you mean "median"?'),
        (["--methods", "LoRA,linear", "--tuning-fraction", "1"], "--tuning-fraction is 1.0; it must lie between 0"),
        (["--methods", "LoRA,linear", "--tune", "model.method.alpha"], "write a setting and its space"),
        (["--methods", "LoRA,linear", "--tune", "model.method.alpha=8"], 'is no space; write LOW..HIGH'),
        (["--methods", "LoRA,linear", "--until", "wide"], '--until is "wide"; write a half width such as 1%'),
        (["--methods", "LoRA,linear", "--vary", "rank"], "write a setting and its values"),
        (["--resume", "nowhere"], '"nowhere" holds no plan.json, so it is no comparison\'s folder'),
        (["--resume", "nowhere", "--data.limit", "3"], "a comparison that has begun keeps its plan"),
        (["--join", "nowhere"], "there is no such folder or journal"),
        (["--status", "nowhere"], "holds no plan.json"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    config = ["--config", "lora"] if words[0] == "--methods" else []
    assert main(["compare", *config, *words]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_extra(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else real(name))
    assert main(["compare", "--methods", "LoRA,DoRA"]) == 2
    assert 'compare needs optuna; pip install "lora-lightning[compare]"' in capsys.readouterr().err


def test_folders_are_numbered(tmp_path):
    assert [new_folder(tmp_path / "compare").name for _ in range(2)] == ["001", "002"]


def test_an_own_folder_is_a_new_one(tmp_path):
    folder = own_folder(tmp_path / "words" / "spring")
    assert folder.is_dir()
    (folder / "plan.json").touch()
    with pytest.raises(RunFolderError, match=r"it is there already\. --resume .*spring\" goes on with it"):
        own_folder(folder)


def test_options_of_a_comparison_that_has_begun_stay():
    begun = comparisons.plan(seeds=5)
    check_same(begun, checked_options(parsed("--methods", "LoRA")))
    check_same(begun, checked_options(parsed("--seeds", "5")))
    with pytest.raises(SettingsError, match=r"--resume: seeds is 4, and the comparison has begun with 5"):
        check_same(begun, checked_options(parsed("--seeds", "4")))


def test_a_file_of_arms_is_told_from_a_config(tmp_path):
    arms, config = tmp_path / "arms.yaml", tmp_path / "config.yaml"
    arms.write_text("config: lora\narms: [LoRA, DoRA]\n")
    config.write_text("model: {pretrained: x}\n")
    assert arms_file(["--config", str(arms), "--data.limit", "3"]) == arms
    assert arms_file(["--config", str(config)]) is None
    assert arms_file(["--config", "lora"]) is None


def test_who_is_joined(tmp_path):
    comparisons.plan().write(tmp_path)
    (tmp_path / "journal.log").touch()
    assert joined(str(tmp_path)) == joined(str(tmp_path / "journal.log")) == tmp_path
    with pytest.raises(RunFolderError, match=r"no comparison has begun there"):
        joined(f"sqlite:///{tmp_path / 'none.db'}")


def test_status_of_one_that_has_ended(finished, capsys):
    assert main(["compare", "--status", str(finished[0])]) == 0
    assert "validation accuracy" in capsys.readouterr().out


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_options_of_a_file_of_arms_hold_where_the_line_says_nothing(tmp_path):
    options = {"seeds": 5, "budget": "same", "time": True, "no-tuning": False, "tune": ["a=1..2", "b=1..2"]}
    read = with_options(parsed("--seeds", "2", "--jobs", "3"), options, tmp_path / "arms.yaml")
    assert (read.seeds, read.budget, read.time, read.no_tuning, read.jobs) == (2, "same", True, False, 3)
    assert read.tune == ["a=1..2", "b=1..2"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budgt": "same"}, r'options has "budgt"\. Did you mean "budget"\? It takes seeds, until, budget'),
        ({"resume": "x"}, r'options has "resume"'),
        ({"seeds": "many"}, r"argument --seeds: invalid int value: 'many'"),
    ],
)
def test_options_that_a_file_of_arms_cannot_have(tmp_path, options, said):
    with pytest.raises(LoraLightningError, match=said):
        with_options(parsed(), options, tmp_path / "arms.yaml")


def test_a_file_of_arms_goes_by_its_name(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "configs" / "claims"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("arms: [LoRA, DoRA]\n")
    monkeypatch.setattr(configs, "config_roots", lambda: [tmp_path / "configs"])
    assert arms_file(["--config", "claims/mine"]) == folder / "mine.yaml"
    assert main(["fit", "--config", "claims/mine"]) == 2
    assert "mine.yaml takes it." in capsys.readouterr().err
